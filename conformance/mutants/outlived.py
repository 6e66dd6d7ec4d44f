"""Faults of what is left when a run is over, and of hooks that are shown no batch."""

from __future__ import annotations

from typing import Any

import torch

from adapter import attention
from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import add, bridge_mutant, mutant, points

KILLER = "surface.nothing_kept"


@mutant("outlived.pattern", "any", KILLER, attention, "softmax")
def pattern(original: Any) -> Any:
    """The last pattern stays alive."""
    kept: dict[str, Any] = {}

    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> Any:
        kept["pattern"] = original(scores, dim=dim, dtype=dtype)
        return kept["pattern"]

    return softmax


@mutant("outlived.first_pattern", "any", KILLER, attention, "softmax")
def first_pattern(original: Any) -> Any:
    """The first pattern of all stays alive."""
    kept: dict[str, Any] = {}

    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> Any:
        out = original(scores, dim=dim, dtype=dtype)
        kept.setdefault("pattern", out)
        return out

    return softmax


@mutant("outlived.cache", "run_with_cache", KILLER, OlmoTransformerBridge, "run_with_cache")
def last_cache(original: Any) -> Any:
    """The bridge holds on to the last activation cache."""

    def run(self: Any, *args: Any, **named: Any) -> Any:
        self.__dict__["last_cache"] = original(self, *args, **named)
        return self.__dict__["last_cache"]

    return run


@bridge_mutant("outlived.gradient", "a backward", KILLER)
def gradient(bridge: Any) -> None:
    """The last gradient of each block's input stays alive."""
    kept = bridge.__dict__["last_gradients"] = {}

    def listen(name: str) -> Any:
        return lambda gradient, hook: kept.update({name: gradient})

    for point in points(bridge, "blocks.{i}.hook_in"):
        point.add_hook(listen(str(point.name)), dir="bwd", is_permanent=True)


def _rows(change: Any) -> Any:
    """run_with_hooks(remove_batch_dim=True) with its hooks as ``change`` leaves them."""

    def make(original: Any) -> Any:
        def run(self: Any, *args: Any, **named: Any) -> Any:
            if named.get("remove_batch_dim"):
                change(named)
            return original(self, *args, **named)

        return run

    return make


def _with_batch(named: dict[str, Any]) -> None:
    named["remove_batch_dim"] = False


def _nothing_returned(named: dict[str, Any]) -> None:
    def quiet(function: Any) -> Any:
        def hook(tensor: Any, hook: Any) -> None:
            function(tensor, hook)

        return hook

    named["fwd_hooks"] = [(name, quiet(function)) for name, function in named["fwd_hooks"]]


def _backward_with_batch(named: dict[str, Any]) -> None:
    def wide(function: Any) -> Any:
        return lambda tensor, hook: function(tensor[None], hook)

    named["bwd_hooks"] = [(name, wide(function)) for name, function in named["bwd_hooks"]]


def _twice(named: dict[str, Any]) -> None:
    named["fwd_hooks"] = [*named["fwd_hooks"], *named["fwd_hooks"]]


for name, breaks, trigger, change in (
    ("twice", "a forward hook is called twice", "any", _twice),
    ("kept_batch", "remove_batch_dim is ignored", "any", _with_batch),
    (
        "nothing_returned",
        "what a hook returns without its batch is dropped",
        "an edit",
        _nothing_returned,
    ),
    (
        "backward_batch",
        "backward hooks are given the batch all the same",
        "a backward",
        _backward_with_batch,
    ),
):
    killer, owner = "interventions.batchless", OlmoTransformerBridge
    add(f"batchless.{name}", breaks, trigger, killer, owner, "run_with_hooks", _rows(change))
