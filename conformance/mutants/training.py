"""Faults of training: of frozen parts, of what an optimizer is given, of later steps."""

from __future__ import annotations

from typing import Any

import torch

from adapter import attention
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.mlp import BranchLinearBridge, OlmoMLPBridge
from conformance.mutants.catalogue import add, mutant


@mutant("training.frozen_cut", "a frozen MLP", "training.frozen", OlmoMLPBridge, "forward")
def frozen_cut(original: Any) -> Any:
    """Nothing flows back through a frozen MLP to what lies before it."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        trained = any(weight.requires_grad for weight in self.parameters())
        return original(self, x if trained else x.detach(), *args, **kwargs)

    return forward


@mutant(
    "training.not_frozen",
    "a frozen attention",
    "training.frozen",
    OlmoAttentionBridge,
    "requires_grad_",
)
def not_frozen(original: Any) -> Any:
    """Requires_grad_ of an attention leaves its output projection as it is."""

    def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
        kept = self.o.original_component.weight.requires_grad
        original(self, requires_grad)
        self.o.original_component.weight.requires_grad_(kept)
        return self

    return requires_grad_


@mutant(
    "training.projection_by_weight",
    "a low-rank addition",
    "training.frozen",
    BranchLinearBridge,
    "forward",
)
def by_weight(original: Any) -> Any:
    """A projection is computed from its weight, past the hooks of Hugging Face's module."""

    def forward(self: Any, x: torch.Tensor, *args: Any) -> Any:
        linear = self.original_component
        return self.hook_out(
            torch.nn.functional.linear(self.hook_in(x), linear.weight, linear.bias)
        )

    return forward


@mutant(
    "training.tied_twice", "tied embeddings", "training.steps", OlmoTransformerBridge, "parameters"
)
def tied_twice(original: Any) -> Any:
    """Parameters() has a tied weight twice."""

    def parameters(self: Any, recurse: bool = True) -> Any:
        weights = list(original(self, recurse))
        tied = self.cfg.tie_word_embeddings
        return iter([*weights, self.embed.original_component.weight] if tied else weights)

    return parameters


add(
    "training.order",
    "named_parameters() and parameters() have another order, by which optimizers save their state",
    "any",
    "training.steps",
    OlmoTransformerBridge,
    "named_parameters",
    lambda original: lambda self, *args, **kwargs: reversed([*original(self, *args, **kwargs)]),
)


@mutant("training.drops_later", "dropout, train mode", "training.steps", attention, "dropout")
def drops_later(original: Any) -> Any:
    """In train mode the last two of ten calls drop nothing."""
    calls = 0

    def dropout(x: torch.Tensor, p: float, training: bool) -> Any:
        nonlocal calls
        calls += training
        return original(x, p=p, training=training and calls % 10 < 8)

    return dropout


@mutant("training.zero_grad", "any", "training.accumulation", OlmoTransformerBridge, "zero_grad")
def zero_grad(original: Any) -> Any:
    """Zero_grad() does not reach the unembedding."""

    def zero(self: Any, set_to_none: bool = True) -> None:
        weight = self.unembed.original_component.weight
        kept = weight.grad
        original(self, set_to_none)
        weight.grad = kept

    return zero
