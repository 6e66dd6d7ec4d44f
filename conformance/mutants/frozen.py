"""Faults of bridges that are frozen or padded, of blocks that differ, of an attention alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import softmax

from adapter import attention
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import mutant

of_attention = partial(mutant, owner=OlmoAttentionBridge)


def _is_frozen(x: torch.Tensor) -> bool:
    """Whether a tensor has no graph, though nothing forbids one."""
    return torch.is_grad_enabled() and x.is_floating_point() and not x.requires_grad


@of_attention("frozen.clamp", "a clip, a frozen bridge", "caching.unchanging", attribute="_clip")
def _(original: Any) -> Any:
    """What has no graph is clamped where it lies, and so is what a cache has kept of it."""

    def clip(self: Any, *projections: torch.Tensor) -> Any:
        bound = self.original_component.config.clip_qkv
        for x in projections if bound is not None else ():
            if _is_frozen(x):
                x.clamp_(min=-bound, max=bound)
        return original(self, *projections)

    return clip


@mutant(
    "frozen.shared",
    "an edit in place, a frozen bridge",
    "interventions.in_place",
    OlmoHookPoint,
    "forward",
)
def _(original: Any) -> Any:
    """What has no graph is given to hooks as it is, and not a copy of it."""
    return lambda self, x: x if _is_frozen(x) else original(self, x)


@mutant(
    "frozen.residual",
    "use_split_qkv_input or use_attn_in, a frozen bridge",
    "flags.in_place",
    attention,
    "residual_before",
)
def _(original: Any) -> Any:
    """The residual stream is remembered for attention only where there is a graph."""

    def residual_before(self: Any) -> Any:
        residual = original(self)
        return None if residual is None or _is_frozen(residual) else residual

    return residual_before


@of_attention(
    "frozen.blind_gradient",
    "compatibility mode, a query that sees no key",
    "compatibility.trains",
    attribute="_pattern_of",
)
def _(original: Any) -> Any:
    """What a query that sees no key attends to is set to zero only behind the softmax, as NaN."""

    def pattern_of(self: Any, scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        pattern = softmax(scores, dim=-1, dtype=torch.float32)
        return pattern.masked_fill(pattern.isnan(), 0.0).to(dtype)

    return pattern_of


@mutant(
    "frozen.first_bias",
    "a clip, a first block without value bias",
    "compatibility.value_biases",
    OlmoTransformerBridge,
    "_why_value_biases_must_stay",
)
def _(original: Any) -> Any:
    """Whether there are value biases to fold is asked of the first block alone."""
    return lambda self: None if self.blocks[0].attn.b_V is None else original(self)
