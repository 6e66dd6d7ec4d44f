"""Faults of hooks behind flags where a bridge is called otherwise than by a plain forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from adapter import forks
from adapter.block import OlmoBlockBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.gates import GATES
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import Make, add, mutant
from conformance.spec import FLAGS


@contextmanager
def _without_flags(bridge: Any) -> Iterator[None]:
    """Turn off every flag for a while."""
    on = [flag for flag in FLAGS if getattr(bridge.cfg, flag)]
    for flag in on:
        setattr(bridge.cfg, flag, False)
    try:
        yield
    finally:
        for flag in on:
            setattr(bridge.cfg, flag, True)


def _always(input: Any, named: dict[str, Any]) -> bool:
    return True


def _late(input: Any, named: dict[str, Any]) -> bool:
    return bool(named.get("start_at_layer"))


def _embedded(input: Any, named: dict[str, Any]) -> bool:
    source = named.get("inputs_embeds", input)
    return isinstance(source, torch.Tensor) and source.is_floating_point()


def _transformed(input: Any, named: dict[str, Any]) -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _off_where(holds: Callable[[Any, dict[str, Any]], bool]) -> Make:
    """Calls with a certain input, or certain arguments, run without flags."""

    def make(original: Any) -> Any:
        def call(self: Any, input: Any = None, *args: Any, **named: Any) -> Any:
            with _without_flags(self) if holds(input, named) else nullcontext():
                return original(self, input, *args, **named)

        return call

    return make


for name, where, trigger, killer, attribute, holds in (
    (
        "generation.flags_off",
        "while a bridge generates",
        "generate",
        "generation.hooks",
        "generate",
        _always,
    ),
    (
        "flags.start_late",
        "in a run that starts at a later block",
        "start_at_layer",
        "caching.layers",
        "forward",
        _late,
    ),
    (
        "flags.embeddings",
        "in a run on embeddings",
        "embeddings in the place of tokens",
        "calls.embeddings",
        "forward",
        _embedded,
    ),
    (
        "flags.func",
        "where torch.func transforms a forward",
        "grad, jvp or vmap",
        "derivatives.transformed",
        "forward",
        _transformed,
    ),
):
    add(
        name,
        f"flags are off {where}",
        f"a flag, and {trigger}",
        killer,
        OlmoTransformerBridge,
        attribute,
        _off_where(holds),
    )


@mutant(
    "flags.parametrized",
    "an edit by heads, and a parametrized projection",
    "flags.refused",
    forks,
    "parameters_of",
)
def _(original: Any) -> Any:
    """What heads change is projected with the weight that a parametrization starts from."""

    def parameters_of(projection: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        held = getattr(projection, "parametrizations", {})
        weight, bias = original(projection)
        return held["weight"].original if "weight" in held else weight, bias

    return parameters_of


@mutant(
    "block.fp16_clamped",
    "a residual stream that overflows",
    "precision.everywhere",
    OlmoBlockBridge,
    "forward",
)
def _(original: Any) -> Any:
    """An infinite entry of what a block returns is the greatest finite one, as in some models."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        most = torch.finfo(output.dtype).max
        return output.clamp(-most, most) if bool(output.isinf().any()) else output

    return forward


@mutant(
    "block.nan_scrubbed",
    "NaN in the residual stream",
    "precision.everywhere",
    OlmoBlockBridge,
    "forward",
)
def _(original: Any) -> Any:
    """NaN in what a block returns is 0."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        return output.masked_fill(output.isnan(), 0) if bool(output.isnan().any()) else output

    return forward


@mutant(
    "flags.returned_gradient",
    "a gradient that is returned behind a flag",
    "flags.edits",
    OlmoHookPoint,
    "register_full_backward_hook",
)
def _(original: Any) -> Any:
    """What a backward hook behind a flag returns is dropped."""

    def register(self: Any, hook: Any, prepend: bool = False) -> Any:
        def listen(*args: Any) -> None:
            hook(*args)

        gated = str(self.name).rpartition(".")[2] in GATES
        return original(self, listen if gated else hook, prepend)

    return register


@mutant(
    "flags.deep_lost",
    "an edit behind a flag in the fourth block or above",
    "flags.edits",
    OlmoHookPoint,
    "__call__",
)
def _(original: Any) -> Any:
    """From the fourth block on, what hooks behind flags return is dropped."""

    def call(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        hooked: torch.Tensor = original(self, tensor)
        words = str(self.name).split(".")
        lost = words[-1] in GATES and int(words[1]) >= 3
        return tensor if lost else hooked

    return call
