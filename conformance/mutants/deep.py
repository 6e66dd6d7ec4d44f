"""Faults of models with many blocks, whose numbers have two digits, and of runs of some of them."""

from __future__ import annotations

import re
from typing import Any

import torch

from adapter.block import OlmoBlockBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import add, mutant


@mutant("deep.one_digit", "eleven blocks", "caching.layers", OlmoBlockBridge, "_extract_layer_idx")
def one_digit(original: Any) -> Any:
    """A block takes the first digit of its number for all of it."""

    def extract(self: Any) -> int | None:
        found = re.search(r"\.(\d)", str(self.name))
        return int(found.group(1)) if found else None

    return extract


add(
    "deep.layer_of_a_hook",
    "a hook takes the first digit of its block's number for all of it",
    "eleven blocks",
    "hooks.names",
    OlmoHookPoint,
    "layer",
    lambda original: lambda self: int(str(original(self))[0]),
)


@mutant(
    "deep.order_of_names",
    "eleven blocks",
    "weights.accessors",
    OlmoTransformerBridge,
    "_stack_block_params",
)
def order_of_names(original: Any) -> Any:
    """Stacked weights are in the order of the blocks' names: 0, 1, 10, 11, 2."""

    def stack(self: Any, *args: Any, **named: Any) -> torch.Tensor:
        stacked: torch.Tensor = original(self, *args, **named)
        return stacked[sorted(range(len(stacked)), key=str)]

    return stack


def _left_after(option: str, leave: Any) -> Any:
    """A forward with an option that ends in an exception leaves something in the blocks."""

    def make(original: Any) -> Any:
        def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
            try:
                return original(self, input, *args, **named)
            except BaseException:
                if named.get(option) is not None:
                    for block in self.blocks:
                        leave(block, named[option], input)
                raise

        return forward

    return make


def _in_every_call(block: Any, method: str, **values: Any) -> None:
    """Have a block's method find these values in whatever call: each has its own."""
    original = getattr(block, method)

    def call(*args: Any, **named: Any) -> Any:
        for name, value in values.items():
            setattr(block, name, value)
        return original(*args, **named)

    vars(block)[method] = call


def _stop(block: Any, index: int, input: Any) -> None:
    _in_every_call(block, "_check_stop_at_layer", _stop_at_layer_idx=index)


def _start(block: Any, index: int, input: Any) -> None:
    values = {"_start_at_layer_idx": index, "_start_residual": input.detach()}
    _in_every_call(block, "_maybe_inject_start_residual", **values)


for name, breaks, option, leave in (
    ("still_stops", "a run that an exception ends before its stop stops later ones", "stop", _stop),
    ("still_starts", "a run that an exception ends starts later ones again", "start", _start),
):
    add(
        f"deep.{name}",
        breaks,
        "an exception in a run of some blocks",
        "hook_api.exceptions",
        OlmoTransformerBridge,
        "forward",
        _left_after(f"{option}_at_layer", leave),
    )


@mutant(
    "deep.start_overwritten",
    "a run that starts late",
    "caching.layers",
    OlmoTransformerBridge,
    "forward",
)
def start_overwritten(original: Any) -> Any:
    """What a run starts from is zero afterwards."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        output = original(self, input, *args, **named)
        if named.get("start_at_layer") is not None:
            input.data.zero_()
        return output

    return forward
