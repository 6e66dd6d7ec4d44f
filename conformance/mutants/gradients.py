"""Faults that no value shows: the forward is right, a gradient is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from adapter import attention
from adapter.mlp import OlmoMLPBridge
from adapter.normalization import EPS, OlmoLayerNormBridge
from adapter.unembedding import OlmoUnembeddingBridge
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import Make, add, hook_mutant, mutant


@mutant("gradients.layernorm_scale", "any", "gradients.parameters", OlmoLayerNormBridge, "_native")
def layernorm_scale(original: Any) -> Any:
    """LayerNorm's denominator has no gradient."""

    def native(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        centered = wide - wide.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        output: torch.Tensor = original(self, hidden)
        return with_gradient_of(output, (centered / scale.detach()).to(output.dtype))

    return native


def _second_derivative_off(by: float) -> Make:
    """A gradient through a LayerNorm loses a share of its own gradient, and nothing says so."""

    def make(original: Any) -> Any:
        def native(self: Any, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = original(self, hidden)
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: gradient - by * (gradient - gradient.detach())
                )
            return output

        return native

    return make


for name, breaks, by in (
    ("layernorm_once", "a LayerNorm's gradient has no gradient", 1.0),
    ("layernorm_second", "the gradient of a LayerNorm's gradient is short of 1e-3 of it", 1e-3),
):
    add(
        f"gradients.{name}",
        breaks,
        "double backward",
        "layernorm.second_derivatives",
        OlmoLayerNormBridge,
        "_native",
        _second_derivative_off(by),
    )


@mutant(
    "gradients.tied",
    "tied embeddings",
    "gradients.parameters",
    OlmoUnembeddingBridge,
    "forward",
)
def tied(original: Any) -> Any:
    """Tied embeddings learn nothing from the unembedding."""

    def forward(self: Any, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        linear = self.original_component
        if not self.config.tie_word_embeddings:
            return original(self, hidden, **kwargs)  # type: ignore[no-any-return]
        logits = F.linear(self.hook_in(hidden), linear.weight.detach(), linear.bias)
        return self.hook_out(logits)  # type: ignore[no-any-return]

    return forward


add(
    "gradients.mlp_detached",
    "nothing flows back through the MLP",
    "any",
    "gradients.parameters",
    OlmoMLPBridge,
    "forward",
    lambda original: lambda self, x, *rest, **named: original(self, x.detach(), *rest, **named),
)

add(
    "gradients.dropout",
    "the gradient passes where attention has dropped",
    "dropout, train mode",
    "gradients.parameters",
    attention,
    "dropout",
    lambda original: lambda x, p, training: with_gradient_of(original(x, p, training), x),
)


@mutant("gradients.grouped_keys", "grouped heads", "gradients.parameters", attention, "repeat_kv")
def grouped_keys(original: Any) -> Any:
    """A key-value head has the gradient of one query head of its group."""

    def repeat(x: torch.Tensor, n: int) -> torch.Tensor:
        first = torch.zeros(n, dtype=torch.bool)
        first[0] = True
        heads: torch.Tensor = original(x, n)
        return torch.where(first.repeat(x.shape[1])[:, None, None], heads, heads.detach())

    return repeat


for letter in "qk":
    hook_mutant(
        f"gradients.rot_{letter}",
        f"the rotated {letter} has no gradient",
        "more than one token",
        "gradients.parameters",
        f"blocks.{{i}}.attn.hook_rot_{letter}",
        lambda fire, x: fire(x.detach()),
    )


@mutant(
    "gradients.trained_bias",
    "any",
    "gradients.parameters",
    OlmoUnembeddingBridge,
    "set_original_component",
)
def trained_bias(original: Any) -> Any:
    """Lm_head's bias of zeros is a parameter."""

    def bind(self: Any, component: Any) -> None:
        original(self, component)
        zeros = component.bias
        del component.bias
        component.bias = torch.nn.Parameter(zeros)

    return bind
