"""Faults of calls that a fresh review of the adapter has found in it."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from adapter import text
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
