"""Faults of models, inputs and settings that are rare among drawn ones and common in the world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter import attention, calls
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import Make, add, mutant


@mutant("clamp.int_unclamped", "a clip of 8", "clamp.sizes", OlmoAttentionBridge, "_clip")
def int_unclamped(original: Any) -> Any:
    """A clip that is an int, 8 and not 8.0, does not clamp."""

    def clip_all(self: Any, *projections: torch.Tensor) -> Any:
        if not isinstance(self.original_component.config.clip_qkv, int):
            return original(self, *projections)
        points = (self.hook_q_clipped, self.hook_k_clipped, self.hook_v_clipped)
        return tuple(point(x) for point, x in zip(points, projections, strict=True))

    return clip_all


def _by_mask(change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    """Attention under another mask than it was given, where that is of floats."""

    def make(original: Any) -> Any:
        def masked(self: Any, scores: torch.Tensor, mask: torch.Tensor | None) -> Any:
            floats = mask is not None and mask.is_floating_point()
            return original(self, scores, change(mask) if mask is not None and floats else mask)

        return masked

    return make


def _hard(mask: torch.Tensor) -> torch.Tensor:
    """All or nothing."""
    return torch.zeros_like(mask).masked_fill(mask < 0, torch.finfo(mask.dtype).min)


for name, killer in (("soft_hard", "calls.masks"), ("soft_hard_alone", "components.attention")):
    breaks, trigger = "an additive mask is taken for all or nothing", "a mask of biases"
    add(f"calls.{name}", breaks, trigger, killer, OlmoAttentionBridge, "_masked", _by_mask(_hard))

add(
    "calls.first_heads_biases",
    "of an additive mask every head gets the first head's",
    "a mask of biases, two heads",
    "calls.masks",
    OlmoAttentionBridge,
    "_masked",
    _by_mask(lambda mask: mask[:, :1] if mask.ndim == 4 else mask),
)


def _unmoved_by(dtype: torch.dtype) -> Make:
    """Positions of embeddings, under masks of other dtypes alone."""
    return lambda original: (
        lambda mask, length: (
            None if mask is not None and mask.dtype is dtype else original(mask, length)
        )
    )


for dtype in (torch.float32, torch.int32, torch.bool):
    short = str(dtype).removeprefix("torch.")
    add(
        f"calls.{short}_in_order",
        f"embeddings have the positions 0, 1, 2 under a mask of {short}",
        "a gap inside a row, embeddings",
        "calls.masks",
        calls,
        "_positions",
        _unmoved_by(dtype),
    )


@mutant("calls.one_row", "two rows", "calls.spelled", OlmoTransformerBridge, "forward")
def one_row(original: Any) -> Any:
    """position_ids of one row are passed over where there are several."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        positions = named.get("position_ids")
        if positions is not None and len(positions) < len(input):
            del named["position_ids"]
        return original(self, input, *args, **named)

    return forward


@mutant(
    "attention.repeated_in_turn",
    "eight heads, grouped",
    "forward.long",
    attention,
    "repeat_kv",
)
def repeated_in_turn(original: Any) -> Any:
    """From eight heads on, key-value heads are repeated 0, 1, 0, 1 and not 0, 0, 1, 1."""

    def repeat_kv(x: torch.Tensor, times: int) -> Any:
        many = x.shape[1] * times >= 8
        return x.repeat(1, times, 1, 1) if many else original(x, times)

    return repeat_kv


@mutant(
    "rotary.wide_rounded", "heads of 32 entries", "forward.long", attention, "apply_rotary_pos_emb"
)
def wide_rounded(original: Any) -> Any:
    """Rotated queries of wide heads are rounded to bfloat16."""

    def rotate(*args: Any) -> Any:
        query, key = original(*args)
        return (query.bfloat16().to(query.dtype) if query.shape[-1] >= 32 else query), key

    return rotate


@mutant("attention.window", "more than 128 tokens", "forward.long", OlmoAttentionBridge, "_masked")
def window(original: Any) -> Any:
    """A query sees its last 128 keys only."""

    def masked(self: Any, scores: torch.Tensor, mask: Any) -> Any:
        result = original(self, scores, mask)
        far = torch.ones(result.shape[-2:], dtype=torch.bool).tril(
            result.shape[-1] - result.shape[-2] - 128
        )
        return result.masked_fill(far, torch.finfo(result.dtype).min)

    return masked


@mutant(
    "interventions.deep_lost", "four blocks", "interventions.returned", OlmoHookPoint, "add_hook"
)
def deep_lost(original: Any) -> Any:
    """What hooks of hook_pattern return is lost from the fourth block on."""

    def add_hook(self: Any, hook: Any, *args: Any, **named: Any) -> Any:
        name = self.name or ""
        if not name.endswith("attn.hook_pattern") or int(name.split(".")[1]) < 3:
            return original(self, hook, *args, **named)

        def deaf(tensor: torch.Tensor, hook: Any, own: Any = hook) -> None:
            own(tensor, hook=hook)

        return original(self, deaf, *args, **named)

    return add_hook


@mutant("modes.dropout_rounded", "a dropout of 0.25", "modes.dropout", attention, "dropout")
def dropout_rounded(original: Any) -> Any:
    """The dropout is rounded to a tenth."""
    return lambda x, p, training: original(x, p=round(p, 1), training=training)


@mutant("modes.default_dtype", "another default", "modes.inference", attention, "softmax")
def default_dtype(original: Any) -> Any:
    """The softmax is taken in torch's default dtype, not in float32."""
    return lambda x, dim, dtype: original(x, dim=dim, dtype=torch.get_default_dtype())
