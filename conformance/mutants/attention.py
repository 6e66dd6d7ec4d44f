"""Faults of attention: groups, scale, mask, softmax, cache, dropout."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge

from adapter import attention
from adapter.attention import OlmoAttentionBridge
from conformance.mutants.catalogue import add, bridge_mutant, mutant

add(
    "attention.groups_tiled",
    "key-value heads are repeated as 0, 1, 0, 1 instead of 0, 0, 1, 1",
    "1 < n_kv < n_heads",
    "forward.logits",
    attention,
    "repeat_kv",
    lambda original: lambda x, n: x.repeat(1, n, 1, 1) if n > 1 else x,
)


@bridge_mutant("attention.scale", "a head_dim of its own", "forward.logits")
def scale(bridge: Any) -> None:
    """Scores are scaled by d_model / n_heads instead of d_head."""
    for block in bridge.blocks:
        hf = block.attn.original_component
        hf.scaling = (hf.config.hidden_size / hf.config.num_attention_heads) ** -0.5


add(
    "attention.softmax_wide",
    "softmax is taken in the scores' dtype instead of float32",
    "float64, of which Hugging Face's softmax keeps float32's bits",
    "forward.logits",
    attention,
    "softmax",
    lambda original: lambda scores, dim, dtype: original(scores, dim=dim),
)


@mutant(
    "attention.softmax_short",
    "bfloat16 or float16",
    "precision.everywhere",
    attention,
    "softmax",
)
def softmax_short(original: Any) -> Any:
    """Exponentials are summed in the scores' dtype instead of float32."""

    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        powers = (scores - scores.amax(dim, keepdim=True)).exp()
        short: torch.Tensor = powers / powers.sum(dim, keepdim=True)
        is_short = scores.dtype in (torch.bfloat16, torch.float16)
        return short.to(dtype) if is_short else original(scores, dim=dim, dtype=dtype)

    return softmax


add(
    "mask.ignored",
    "padding is attended to",
    "padding",
    "forward.logits",
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
    lambda original: lambda self, scores, mask, *sizes: original(self, scores, None, *sizes),
)


@mutant(
    "mask.unshifted",
    "more than one chunk over a cache",
    "forward.logits",
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
)
def unshifted(original: Any) -> Any:
    """A later chunk's queries see only as many keys as if they were the first chunk's."""

    def masked(self: Any, scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        result: torch.Tensor = original(self, scores, *rest)
        return result

    return masked


@mutant(
    "cache.ignored",
    "more than one chunk over a cache",
    "forward.logits",
    OlmoAttentionBridge,
    "_update_kv_cache",
)
def cache_ignored(original: Any) -> Any:
    """Attention sees the keys and values of this forward alone."""

    def update(self: Any, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        new = key.shape[2]
        return tuple(x[:, :, -new:] for x in original(self, key, value, **kwargs))

    return update


@mutant(
    "cache.wide",
    "bfloat16 or float16 and a cache",
    "precision.cache",
    OlmoAttentionBridge,
    "_update_kv_cache",
)
def cache_wide(original: Any) -> Any:
    """The cache keeps keys and values in float32."""

    def update(self: Any, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        wide = torch.promote_types(key.dtype, torch.float32)
        both = original(self, key.to(wide), value.to(wide), **kwargs)
        return tuple(x.to(key.dtype) for x in both)

    return update


@mutant(
    "cache.expected",
    "an attention called alone",
    "components.attention",
    OlmoAttentionBridge,
    "_update_kv_cache",
)
def cache_expected(original: Any) -> Any:
    """Attention works only inside of a model, which says whether there is a cache."""

    def update(self: Any, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        kwargs["past_key_values"]
        return original(self, key, value, **kwargs)

    return update


add(
    "attention.upstream",
    "rotated q and k stay float32, which crashes without a cache: transformer_lens' own attention",
    "bfloat16 or float16 and no cache",
    "precision.no_cache",
    OlmoAttentionBridge,
    "forward",
    lambda original: PositionEmbeddingsAttentionBridge.forward,
)


def _across(original: Any) -> Any:
    return lambda x, p, training: original(x.mT.contiguous(), p=p, training=training).mT


for name, breaks, trigger, make in (
    (
        "in_eval",
        "attention drops in eval mode",
        "dropout, eval mode",
        lambda original: lambda x, p, training: original(x, p=p, training=True),
    ),
    (
        "never",
        "attention never drops",
        "dropout, train mode",
        lambda original: lambda x, p, training: x,
    ),
    (
        "across",
        "attention drops other entries than Hugging Face from the same seed",
        "dropout, train mode",
        _across,
    ),
):
    add(f"dropout.{name}", breaks, trigger, "forward.logits", attention, "dropout", make)
