"""Faults of calls that a fresh review of the adapter has found in it."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from adapter import hooks, text
from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.partial_runs import OfTheCall, current_call
from adapter.text import OlmoTextBridge
from conformance.mutants.catalogue import mutant


@mutant("text.cache_unmasked", "texts, padded, over a cache", "text.forward", text, "_behind")
def _(_original: Any) -> Any:
    """The mask of texts over a cache is that of their own tokens."""
    return lambda cache, mask: mask


@mutant(
    "text.prompts_guessed_at",
    "texts of unequal length, or one that begins with what pads",
    "continuation.generation",
    OlmoTextBridge,
    "generate",
)
def _(_original: Any) -> Any:
    """The mask of several texts to go on with is read off their pad tokens."""
    return TransformerBridge.generate


@mutant(
    "text.streams_guessed_at",
    "texts of unequal length, or one that begins with what pads",
    "continuation.streaming",
    OlmoTextBridge,
    "generate_stream",
)
def _(_original: Any) -> Any:
    """The mask of several texts to stream is read off their pad tokens."""
    return TransformerBridge.generate_stream


@mutant(
    "nested.stops_all",
    "stop_at_layer",
    "hook_api.nested",
    OlmoBlockBridge,
    "_stop_at_layer_idx",
)
def _(_original: Any) -> Any:
    """Where a run stops is written on the blocks, for every run."""


@mutant("nested.starts_all", "start_at_layer", "hook_api.nested", OfTheCall, "__get__")
def _(original: Any) -> Any:
    """A run in a hook of one that starts late starts there too."""

    def get(self: Any, owner: Any, kind: Any = None) -> Any:
        value, call = original(self, owner, kind), current_call()
        while value is None and call is not None and "start" in self._name:
            value, call = call.kept.get((owner, self._name)), call.around
        return value

    return get


@mutant(
    "nested.cache_stops_all",
    "run_with_cache with stop_at_layer",
    "hook_api.nested",
    hooks,
    "of_another",
)
def _(_original: Any) -> Any:
    """What stops a run_with_cache stops the runs of its hooks too."""
    return lambda call: False


@mutant(
    "attention.counts_from_the_end",
    "a cache of fixed size under sdpa",
    "calls.sdpa",
    OlmoAttentionBridge,
    "_mask_of_cache",
)
def _(_original: Any) -> Any:
    """Where Hugging Face gives no mask, the last query sees all that a cache has room for."""
    return lambda self, scores, cache: None


@mutant("parameters.applied_often", "any", "parameters.same", OlmoTransformerBridge, "apply")
def _(_original: Any) -> Any:
    """apply() comes to a module once for each module that has it for a child."""
    return torch.nn.Module.apply
