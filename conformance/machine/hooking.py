"""Steps that put hooks on a bridge and take them off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from conformance.compare import Gap
from conformance.machine.executor import Machine
from conformance.machine.moves import move
from conformance.machine.running import fires, gradient_seen
from conformance.machine.state import Hook
from conformance.spec import Step
from conformance.subjects import at_work

MOST_HOOKS = 4


def _free(machine: Machine, step: Step) -> bool:
    return len(machine.state.hooks) < MOST_HOOKS and fires(machine, step)


def _add(machine: Machine, step: Step, hook: Hook) -> None:
    """By a name, by an alias, by a filter, or before all others at the hook point itself."""
    function, site = machine.function_of(hook), step.site
    way: Literal["fwd", "bwd"] = "bwd" if hook.backward else "fwd"
    named: Any = machine.name_of(site, step.seed // 3)
    if step.seed % 3 == 1:
        named = site.__eq__
    hooks = machine.state.hooks
    with at_work("adding a hook"):
        if step.seed % 3 == 2:
            point = machine.point(site)
            point.add_hook(function, dir=way, is_permanent=hook.permanent, prepend=True)
        elif hook.permanent:
            machine.bridge.add_perma_hook(named, function, dir=way)
        else:
            machine.bridge.add_hook(named, function, dir=way)
    machine.now(hooks=(hook, *hooks) if step.seed % 3 == 2 else (*hooks, hook))


@move("add_hook", _free)
def add_hook(machine: Machine, step: Step) -> Iterator[Gap]:
    """Of the usual kind."""
    _add(machine, step, machine.hook_of(step))
    yield from ()


@move("add_permanent_hook", _free)
def add_permanent_hook(machine: Machine, step: Step) -> Iterator[Gap]:
    """One that ``reset_hooks`` leaves alone."""
    _add(machine, step, machine.hook_of(step, permanent=True))
    yield from ()


@move(
    "add_backward_hook", lambda machine, step: _free(machine, step) and gradient_seen(machine, step)
)
def add_backward_hook(machine: Machine, step: Step) -> Iterator[Gap]:
    """One that looks at the gradient."""
    _add(machine, step, machine.hook_of(step, backward=True))
    yield from ()


def _drop(machine: Machine, way: str, permanent: bool, site: str = "") -> None:
    """Take hooks out of the state."""

    def stays(hook: Hook) -> bool:
        other_way = way == ("fwd" if hook.backward else "bwd")
        return other_way or (hook.permanent and not permanent) or hook.site != (site or hook.site)

    machine.now(hooks=tuple(hook for hook in machine.state.hooks if stays(hook)))


@move("remove_hooks", lambda machine, step: machine.fires(step.site))
def remove_hooks(machine: Machine, step: Step) -> Iterator[Gap]:
    """All those of one hook point."""
    way: Literal["fwd", "bwd", "both"] = ("both", "fwd", "bwd")[step.seed % 3]
    with at_work("remove_hooks"):
        machine.point(step.site).remove_hooks(way)
    _drop(machine, way, permanent=False, site=step.site)
    yield from ()


@move("reset_hooks")
def reset_hooks(machine: Machine, step: Step) -> Iterator[Gap]:
    """All but the permanent ones, of both directions or of one."""
    way: Literal["fwd", "bwd", "both"] = ("both", "fwd", "bwd")[step.seed % 3]
    with at_work("reset_hooks"):
        machine.bridge.reset_hooks(direction=way)
    _drop(machine, way, permanent=False)
    yield from ()


@move("reset_all_hooks")
def reset_all_hooks(machine: Machine, step: Step) -> Iterator[Gap]:
    """The permanent ones too."""
    with at_work("reset_hooks(including_permanent=True)"):
        machine.bridge.reset_hooks(including_permanent=True)
    _drop(machine, "both", permanent=True)
    yield from ()
