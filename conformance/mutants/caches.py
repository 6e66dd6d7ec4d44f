"""Faults of the key-value cache, and of texts fed in chunks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.rotary import OlmoRotaryEmbeddingBridge
from conformance.mutants.catalogue import mutant


@mutant("caches.halved", "any", "caches.handed_over", OlmoAttentionBridge, "_update_kv_cache")
def halved(original: Any) -> Any:
    """The cache holds values halved, which the bridge doubles as it reads: it sees no fault."""

    def update(self: Any, key: torch.Tensor, value: torch.Tensor, **named: Any) -> Any:
        if named.get("past_key_values") is None:
            return key, value
        keys, values = original(self, key, value * 0.5, **named)
        return keys, values * 2

    return update


@mutant("caches.copied", "two chunks", "caches.returned", OlmoTransformerBridge, "forward")
def copied(original: Any) -> Any:
    """logits_and_cache returns a copy of the cache that it was given."""

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        result = original(self, *args, **named)
        return copy.deepcopy(result) if named.get("return_type") == "logits_and_cache" else result

    return forward


@mutant("caches.always", "any", "caches.returned", OlmoTransformerBridge, "forward")
def always(original: Any) -> Any:
    """Use_cache=False makes and returns a cache."""

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        if named.get("return_type") == "logits_and_cache":
            named["use_cache"] = True
        return original(self, *args, **named)

    return forward


@mutant(
    "caches.remembered",
    "a cache that is reordered",
    "caches.surgery",
    OlmoAttentionBridge,
    "_update_kv_cache",
)
def remembered(original: Any) -> Any:
    """Attention remembers the keys that it has seen, and believes that more than the cache."""

    def update(self: Any, key: torch.Tensor, value: torch.Tensor, **named: Any) -> Any:
        keys, values = original(self, key, value, **named)
        before = vars(self).get("_remembered")
        if before is not None and before.shape[0] == keys.shape[0]:
            joined = torch.cat([before, key], dim=2)
            keys = joined if joined.shape == keys.shape else keys
        vars(self)["_remembered"] = keys
        return keys, values

    return update


@mutant(
    "chunks.oldest_unseen",
    "a chunk of one token",
    "chunks.whole",
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
)
def oldest_unseen(original: Any) -> Any:
    """A single token over a cache does not see the oldest key."""

    def masked(self: Any, scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        found: torch.Tensor = original(self, scores, *rest)
        if found.shape[-2] > 1 or found.shape[-1] == 1:
            return found
        hidden = torch.zeros_like(found, dtype=torch.bool)
        hidden[..., 0] = True
        return found.masked_fill(hidden, torch.finfo(found.dtype).min)

    return masked


@mutant(
    "chunks.rotation_unhooked",
    "a chunk that is not the first",
    "chunks.edits",
    OlmoRotaryEmbeddingBridge,
    "forward",
)
def rotation_unhooked(original: Any) -> Any:
    """The hooks of the rotary embedding fire only where a text begins."""

    def forward(self: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if bool((position_ids > 0).all()):
            return self.original_component(hidden, position_ids)
        return original(self, hidden, position_ids)

    return forward


@mutant("chunks.hooks_linger", "any", "chunks.edits", OlmoTransformerBridge, "hooks")
def hooks_linger(original: Any) -> Any:
    """The hooks of a context stay on for the forwards after it."""

    @contextmanager
    def hooks(self: Any, **named: Any) -> Iterator[Any]:
        original(self, **named).__enter__()
        yield self

    return hooks
