"""Faults at the far end of a table: of groups, of levels, of hooks at one point, of pad tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from adapter import attention, hooks
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import bridge_mutant, mutant

of_bridge = partial(mutant, owner=OlmoTransformerBridge)
of_point = partial(mutant, owner=OlmoHookPoint)


@mutant(
    "flags.group_of_four", "use_attn_in, groups of four", "flags.edits", attention, "mean_of_groups"
)
def _(original: Any) -> Any:
    """Of a group of four copies and more the first three are averaged."""

    def mean(heads: torch.Tensor, size: int) -> torch.Tensor:
        batch, pos, _, width = heads.shape
        return heads.view(batch, pos, -1, size, width)[:, :, :, :3].mean(3)

    return mean


@mutant("attention.group_of_four", "groups of four", "forward.logits", attention, "repeat_kv")
def _(original: Any) -> Any:
    """The last query head of a group of four reads the next group."""

    def repeat(x: torch.Tensor, times: int) -> torch.Tensor:
        repeated: torch.Tensor = original(x, times)
        return repeated.roll(-1, dims=1) if times == 4 and x.shape[1] > 1 else repeated

    return repeat


@bridge_mutant("embed.pad_is_one", "another pad token, or none", "gradients.parameters")
def _(bridge: Any) -> None:
    """The row of token 1 is not trained, whatever the pad token."""
    bridge.embed.original_component.padding_idx = 1


@of_bridge(
    "hook_api.level_zero", "reset_hooks(level=0)", "hook_api.ledger", attribute="reset_hooks"
)
def _(original: Any) -> Any:
    """Level 0 is taken for no level."""

    def reset(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **{**named, "level": named.get("level") or None})

    return reset


@of_point("hook_api.point_level", "has_hooks(level=...)", "hook_api.ledger", attribute="has_hooks")
def _(original: Any) -> Any:
    """A hook point says of any level what it says of all."""
    return lambda self, *args, level=None, **named: original(self, *args, **named)


@of_bridge(
    "hook_api.list_filter", "list_hooks(function)", "hook_api.ledger", attribute="list_hooks"
)
def _(original: Any) -> Any:
    """A function that picks hook points is passed over."""

    def listed(self: Any, name_filter: Any = None, *args: Any, **named: Any) -> Any:
        return original(self, None if callable(name_filter) else name_filter, *args, **named)

    return listed


@of_bridge("hook_api.list_string", "list_hooks(name)", "hook_api.ledger", attribute="list_hooks")
def _(original: Any) -> Any:
    """A name stands for all that begins with it."""

    def listed(self: Any, name_filter: Any = None, *args: Any, **named: Any) -> Any:
        if isinstance(name_filter, str):
            start = name_filter.rpartition(".")[0]
            name_filter = lambda name: name.startswith(start)  # noqa: E731
        return original(self, name_filter, *args, **named)

    return listed


@of_bridge("hook_api.yields_nothing", "with hooks() as", "hook_api.ledger", attribute="hooks")
def _(original: Any) -> Any:
    """What hooks() gives to a with statement is None."""

    def hooked(self: Any, *args: Any, **named: Any) -> Any:
        @contextmanager
        def context() -> Iterator[None]:
            with original(self, *args, **named):
                yield

        return context()

    return hooked


@of_point(
    "hook_api.sixth", "more than five hooks at a point", "hook_api.order", attribute="add_hook"
)
def _(original: Any) -> Any:
    """The sixth hook at a point is not put on."""

    def add_hook(self: Any, hook: Any, dir: Any = "fwd", *args: Any, **named: Any) -> Any:
        handles = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        handle = original(self, hook, dir, *args, **named)
        if len(handles) == 6:
            handle.hook.remove()
        return handle

    return add_hook


@mutant(
    "firing.tuple_lost",
    "a gradient in a tuple",
    "firing.returned_gradients",
    hooks._Unwrapped,
    "__call__",
)
def _(original: Any) -> Any:
    """A gradient that a backward hook returns in a tuple is passed over."""

    def call(self: Any, gradient: torch.Tensor, hook: Any) -> Any:
        returned = self._hook(gradient, hook=hook)
        return None if isinstance(returned, tuple) else returned

    return call
