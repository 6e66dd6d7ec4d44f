"""Faults of state, of size and of number: what shows in how two runs are related."""

from __future__ import annotations

from typing import Any

import torch

from adapter import attention
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.mlp import OutputLinearBridge
from adapter.rotary import OlmoRotaryEmbeddingBridge
from conformance.mutants.catalogue import PAD_TOKEN, add, hook_mutant, mutant

_MASKED = (OlmoAttentionBridge, "_apply_reconstruct_attention_mask")


@mutant("masked.one_ahead", "three tokens", "metamorphic.causality", *_MASKED)
def one_ahead(original: Any) -> Any:
    """The second token sees the third."""

    def masked(self: Any, scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        due: torch.Tensor = original(self, scores, *rest)
        if scores.shape[-2] > 2:
            due = due.clone()
            due[..., 1, 2] = scores[..., 1, 2]
        return due

    return masked


@mutant("masked.almost", "padding", "metamorphic.padding", *_MASKED)
def almost(original: Any) -> Any:
    """What is masked keeps a weight of e**-12."""

    def masked(self: Any, scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        due: torch.Tensor = original(self, scores, *rest)
        return torch.where(due < scores - 1e4, scores.amax(-1, keepdim=True) - 12, due)

    return masked


@mutant("masked.remembered", "two calls of one shape", "metamorphic.history", *_MASKED)
def remembered(original: Any) -> Any:
    """A mask is kept for the next call of the same shape."""

    def masked(self: Any, scores: torch.Tensor, mask: Any, *sizes: Any) -> Any:
        kept = vars(self).setdefault("_masks", {})
        return original(self, scores, kept.setdefault(scores.shape, mask), *sizes)

    return masked


@mutant(
    "rotary.first_row",
    "rows at other positions",
    "metamorphic.rows",
    OlmoRotaryEmbeddingBridge,
    "forward",
)
def first_row(original: Any) -> Any:
    """All rows are turned as the first one is."""

    def forward(self: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return original(self, hidden, position_ids[:1].expand_as(position_ids))

    return forward


@mutant(
    "rotary.remembered",
    "two calls of one shape",
    "metamorphic.positions",
    OlmoRotaryEmbeddingBridge,
    "forward",
)
def rotary_remembered(original: Any) -> Any:
    """Positions are kept for the next call of the same shape."""

    def forward(self: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        kept = vars(self).setdefault("_kept", {})
        return original(self, hidden, kept.setdefault(position_ids.shape, position_ids))

    return forward


hook_mutant(
    "edited.renormalized",
    "a pattern that a hook gives back is normalized once more",
    "a hook that gives back what it saw",
    "metamorphic.identity",
    "blocks.{i}.attn.hook_pattern",
    lambda fire, x: (
        out if (out := fire(x)) is x else (out / out.sum(-1, keepdim=True)).nan_to_num()
    ),
)


def _saturated(original: Any) -> Any:
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return original(q.clamp(-3e4, 3e4), k.clamp(-3e4, 3e4), cos, sin)

    return rotate


add(
    "large.saturated",
    "queries and keys beyond 30,000 are cut off",
    "large queries or keys",
    "symmetry.scaling",
    attention,
    "apply_rotary_pos_emb",
    _saturated,
)


@mutant(
    "weights.remembered",
    "weights changed in place",
    "symmetry.units",
    OutputLinearBridge,
    "forward",
)
def weights_remembered(original: Any) -> Any:
    """Projections into the residual stream keep the weights of the first forward."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = self.original_component.weight
        kept = vars(self).setdefault("_kept", weight.detach().clone())
        with torch.no_grad():
            now = weight.clone()
            weight.data = kept
        output = original(self, x, *args, **kwargs)
        weight.data = now
        return output

    return forward


add(
    "groups.many",
    "four key-value heads and more are taken in reverse",
    "as many key-value heads",
    "symmetry.groups",
    attention,
    "repeat_kv",
    lambda original: lambda x, n: original(x.flip(1) if x.shape[1] > 3 else x, n),
)


@mutant(
    "tokens.padding",
    "a token of the padding's number, no mask",
    "symmetry.vocabulary",
    OlmoTransformerBridge,
    "forward",
)
def padding(original: Any) -> Any:
    """Without a mask, tokens of the padding's number are masked."""

    def forward(self: Any, input: torch.Tensor, **kwargs: Any) -> Any:
        seen = input.ne(PAD_TOKEN)
        if kwargs.get("attention_mask") is None and bool(seen[:, 0].all()):
            kwargs["attention_mask"] = seen.long()
        return original(self, input, **kwargs)

    return forward


@mutant("clip.short", "a clip", "symmetry.neutral", OlmoAttentionBridge, "_clip")
def short(original: Any) -> Any:
    """Where there is a clip, values are rounded to bfloat16."""

    def clip(self: Any, *projections: torch.Tensor) -> Any:
        q, k, v = original(self, *projections)
        clips = self.original_component.config.clip_qkv is not None
        return (q, k, v.bfloat16().to(v.dtype)) if clips else (q, k, v)

    return clip
