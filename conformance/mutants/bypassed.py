"""Faults that were seeded again: calls that pass something by, and what is kept for too long."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from adapter import block, recompute
from adapter.compatibility import OlmoTransformerBridge
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


@mutant(
    "processing.ten", "12 blocks", "processing.weights", OlmoTransformerBridge, "process_weights"
)
def ten(original: Any) -> Any:
    """What the eleventh block and later ones write is not centered."""

    def process_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        far = [each.mlp.out.original_component for each in self.blocks[10:]]
        before = [linear.weight.detach().clone() for linear in far]
        original(self, *args, **kwargs)
        with torch.no_grad():
            for each, weight in zip(self.blocks[10:], before, strict=True):
                each.mlp.out.original_component.weight.copy_(weight)

    return process_weights


@mutant(
    "weights.ten_biases",
    "11 blocks, output biases",
    "weights.accessors",
    OlmoTransformerBridge,
    "accumulated_bias",
)
def ten_biases(original: Any) -> Any:
    """accumulated_bias leaves out the eleventh block and later ones."""
    return lambda self, layer, *args, **named: original(self, min(layer, 10), *args, **named)
