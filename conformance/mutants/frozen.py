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
alone = partial(of_attention, killer="components.attention")


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


@alone("frozen.alone_normed", "an attention alone under a flag", attribute="_changes")
def _(original: Any) -> Any:
    """Called alone under a flag, attention normalizes what its heads read."""

    def changes(self: Any, residual: torch.Tensor, norm: Any) -> Any:
        lone = isinstance(norm.__self__, torch.nn.Identity)
        return original(self, residual, self._ln1_module.forward if lone else norm)

    return changes


@alone("frozen.alone_silent", "an attention alone under a flag", attribute="_changes")
def _(original: Any) -> Any:
    """Called alone under a flag, attention fires none of its hooks."""

    def changes(self: Any, residual: torch.Tensor, norm: Any) -> Any:
        lone = isinstance(norm.__self__, torch.nn.Identity)
        return [None] * 3 if lone else original(self, residual, norm)

    return changes


@alone("frozen.alone_places", "an attention alone, called by position", attribute="forward")
def _(original: Any) -> Any:
    """A mask given by position is lost."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("hidden_states", "position_embeddings"), args, strict=False))
        given = {**kwargs, **named}
        return original(self, **{"attention_mask": None, **given})

    return forward


@alone("frozen.alone_shifted", "an attention alone without embeddings", attribute="_rotation")
def _(original: Any) -> Any:
    """Where attention is told neither positions nor embeddings, it counts from 1."""

    def rotation(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("position_ids") is None:
            kwargs = {**kwargs, "position_ids": torch.arange(1, x.shape[1] + 1)[None]}
        return original(self, x, kwargs)

    return rotation


@alone("frozen.alone_told", "an attention alone, positions told", attribute="_rotation")
def _(original: Any) -> Any:
    """Where attention computes cosines and sines itself, it does not ask which positions."""

    def rotation(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        return original(self, x, {**kwargs, "position_ids": None})

    return rotation


@mutant(
    "frozen.overflown",
    "float16, a residual stream that overflows, a hook at what heads read",
    "precision.everywhere",
    attention,
    "change_of_heads",
)
def _(original: Any) -> Any:
    """NaN in what a head reads is taken for an edit, since it does not equal itself."""

    def change(residual: torch.Tensor, norm: Any, *args: Any) -> Any:
        made = original(residual, norm, *args)
        nan = norm(residual).isnan().unsqueeze(2)
        return None if made is None else torch.where(nan, torch.nan, made)

    return change
