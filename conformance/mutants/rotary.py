"""Faults of the rotation of q and k, and of the positions it is given."""

from __future__ import annotations

from typing import Any

import torch

from adapter import attention
from adapter.rotary import OlmoRotaryEmbeddingBridge
from conformance.mutants.catalogue import add, mutant


@mutant(
    "rope.adjacent",
    "a position other than 0 and d_head > 2",
    "forward.logits",
    attention,
    "apply_rotary_pos_emb",
)
def adjacent(original: Any) -> Any:
    """Entries 2j and 2j+1 are rotated together instead of j and j + d_head/2."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def rotate(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, ...]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return tuple((x * cos + turned(x) * sin).to(x.dtype) for x in (q, k))

    return rotate


def _no_single_rotation(original: Any) -> Any:
    return lambda q, k, cos, sin: (q, k) if q.shape[2] == 1 else original(q, k, cos, sin)


for name, breaks, trigger, make in (
    (
        "short",
        "cosines and sines are rounded to the model's dtype",
        "bfloat16 or float16",
        lambda original: lambda q, k, cos, sin: original(q, k, cos.to(q.dtype), sin.to(q.dtype)),
    ),
    (
        "single_token",
        "a forward of one token does not rotate",
        "one token in a forward, at a position other than 0",
        _no_single_rotation,
    ),
    (
        "key_only",
        "queries are not rotated",
        "a position other than 0",
        lambda original: lambda q, k, cos, sin: (q, original(q, k, cos, sin)[1]),
    ),
):
    killer = "precision.everywhere" if name == "short" else "forward.logits"
    add(f"rope.{name}", breaks, trigger, killer, attention, "apply_rotary_pos_emb", make)


def _positions(change: Any) -> Any:
    """A rotary embedding that is given other positions ``[batch, pos]``."""

    def make(original: Any) -> Any:
        def forward(self: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return original(self, hidden, change(position_ids))

        return forward

    return make


def _consecutive(positions: torch.Tensor) -> torch.Tensor:
    return positions[:, :1] + torch.arange(positions.shape[1])


for name, breaks, trigger, killer, change in (
    ("off_by_one", "positions start at 1", "any", "hooks.values", lambda p: p + 1),
    (
        "mask_ignored",
        "positions count every token, masked or not",
        "a gap inside a row, or left padding",
        "forward.logits",
        _consecutive,
    ),
    (
        "first_row",
        "every row has the positions of the first",
        "rows padded in different ways",
        "forward.logits",
        lambda p: p[:1].expand_as(p),
    ),
):
    owner = OlmoRotaryEmbeddingBridge
    add(f"positions.{name}", breaks, trigger, killer, owner, "forward", _positions(change))
