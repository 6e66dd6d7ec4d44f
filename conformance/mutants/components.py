"""Faults of components called alone, of their wiring and of how they are found."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.mlp import BranchLinearBridge
from adapter.normalization import EPS, OlmoLayerNormBridge
from adapter.olmo import OlmoArchitectureAdapter
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import add, mutant


@mutant("components.short_norm", "float64", "components.alone", OlmoLayerNormBridge, "_native")
def short_norm(original: Any) -> Any:
    """A LayerNorm alone is taken in its input's dtype instead of float32."""
    return lambda self, x: F.layer_norm(x, x.shape[-1:], eps=EPS)


@mutant("components.watched_gradient", "hooks", "components.alone", BranchLinearBridge, "forward")
def watched_gradient(original: Any) -> Any:
    """A projection with a hook on it sends half of the gradient to its input."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.hook_out._backward_hooks or self.hook_out._forward_hooks:
            x = with_gradient_of(x, x * 0.5)
        return original(self, x, *args, **kwargs)

    return forward


@mutant(
    "components.bool_mask",
    "a boolean mask",
    "components.attention",
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
)
def bool_mask(original: Any) -> Any:
    """A boolean mask is added as zeros and ones."""

    def masked(self: Any, scores: torch.Tensor, mask: Any, *sizes: int) -> Any:
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(scores.dtype)
        return original(self, scores, mask, *sizes)

    return masked


@mutant(
    "components.causal_offset",
    "no mask, a later chunk over a cache",
    "components.attention",
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
)
def causal_offset(original: Any) -> Any:
    """Without a mask a later chunk's queries see all keys, those after them too."""

    def masked(self: Any, scores: torch.Tensor, mask: Any, keys: int, queries: int) -> Any:
        if mask is None and keys > queries:
            return scores
        return original(self, scores, mask, keys, queries)

    return masked


@mutant(
    "components.rotation_gradient",
    "any",
    "components.attention",
    OlmoAttentionBridge,
    "_rotation",
)
def rotation_gradient(original: Any) -> Any:
    """No gradient reaches the sines that an attention is given."""

    def rotation(self: Any, *args: Any) -> Any:
        cos, sin = original(self, *args)
        return cos, sin.detach()

    return rotation


@mutant(
    "components.block_gradient", "any", "components.block", OlmoBlockBridge, "_apply_output_hook"
)
def block_gradient(original: Any) -> Any:
    """A block's first position gets no gradient."""

    def hooked(self: Any, output: Any, **kwargs: Any) -> Any:
        if isinstance(output, torch.Tensor):
            rest = torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
            output = with_gradient_of(output, rest)
        return original(self, output, **kwargs)

    return hooked


@mutant(
    "components.first_wired",
    "two layers",
    "components.wiring",
    OlmoArchitectureAdapter,
    "setup_component_testing",
)
def first_wired(original: Any) -> Any:
    """Only the first block's attention gets the rotary embedding."""

    def setup(self: Any, hf_model: Any, bridge_model: Any = None) -> None:
        kept = [] if bridge_model is None else [b.attn._rotary_emb for b in bridge_model.blocks]
        original(self, hf_model, bridge_model)
        for index, rotary in enumerate(kept[1:], start=1):
            bridge_model.blocks[index].attn.set_rotary_emb(rotary)

    return setup


@mutant(
    "components.template_unwired",
    "any",
    "components.wiring",
    OlmoArchitectureAdapter,
    "setup_component_testing",
)
def template_unwired(original: Any) -> Any:
    """Without a bridge nothing is wired."""

    def setup(self: Any, hf_model: Any, bridge_model: Any = None) -> None:
        original(self, hf_model, bridge_model)
        if bridge_model is None:
            self.get_generalized_component("blocks.0.attn").set_rotary_emb(None)

    return setup


add(
    "components.not_eager",
    "attention stays what it was",
    "any",
    "components.wiring",
    OlmoArchitectureAdapter,
    "_testing_eager",
    lambda original: None,
)


@mutant(
    "components.lost",
    "any",
    "components.lookup",
    OlmoArchitectureAdapter,
    "translate_transformer_lens_path",
)
def lost(original: Any) -> Any:
    """The gate's weight is looked for where the up projection's is."""

    def translate(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        return original(self, path.replace("W_gate", "W_in"), *args, **kwargs)

    return translate
