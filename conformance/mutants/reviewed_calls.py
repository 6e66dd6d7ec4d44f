"""Faults of calls that a fresh review of the adapter has found in it."""

from __future__ import annotations

from typing import Any

from adapter import text
from conformance.mutants.catalogue import mutant


@mutant("text.cache_unmasked", "texts, padded, over a cache", "text.forward", text, "_behind")
def _(_original: Any) -> Any:
    """The mask of texts over a cache is that of their own tokens."""
    return lambda cache, mask: mask
