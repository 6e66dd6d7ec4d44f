"""Faults that were seeded again: calls that pass something by, and what is kept for too long."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from adapter import block, recompute
from conformance.mutants.catalogue import mutant


@mutant("recompute.last", "two forwards", "firing.recomputed", recompute, "_hooks_of")
def last(original: Any) -> Any:
    """What is computed again has the hooks of the last forward, whichever it is of."""

    def hooks_of(module: torch.nn.Module) -> Any:
        kept: list[Any] = vars(module).setdefault("_kept_hooks", [])
        kept[:] = original(module)
        return kept

    return hooks_of


@mutant("recompute.reentrant", "reentrant", "firing.recomputed", block, "same_hooks_again")
def reentrant(original: Any) -> Any:
    """With use_reentrant=True what is computed again lacks the hooks that are gone by then."""

    def same_hooks_again(bridge: Any, layer: Any) -> Any:
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
            return nullcontext()
        return original(bridge, layer)

    return same_hooks_again
