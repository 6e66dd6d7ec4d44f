"""The kinds of steps: what each does, when it is legal, and how one is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from conformance.compare import Gap, labelled
from conformance.machine import invariant
from conformance.machine.executor import Machine
from conformance.spec import Step

Run = Callable[[Machine, Step], Iterator[Gap]]
Legal = Callable[[Machine, Step], bool]


@dataclass(frozen=True)
class Move:
    """A kind of step.

    Attributes:
        run: Does it to the bridge and to the state, and yields the gaps of what came back.
        legal: Whether the state allows it.
    """

    run: Run
    legal: Legal


MOVES: dict[str, Move] = {}


def always(machine: Machine, step: Step) -> bool:
    """Legal in every state."""
    return True


def move(kind: str, legal: Legal = always) -> Callable[[Run], Run]:
    """Register what a kind of step does. See `Move`."""

    def register(run: Run) -> Run:
        MOVES[kind] = Move(run, legal)
        return run

    return register


def legal(machine: Machine, step: Step) -> bool:
    """Whether the state of a machine allows a step."""
    return MOVES[step.kind].legal(machine, step)


def take(machine: Machine, step: Step) -> Iterator[Gap]:
    """Take a step and compare everything; what is not legal is left out.

    Yields:
        The gaps. After the first of them the machine's state means nothing any more.
    """
    if not legal(machine, step):
        return
    found = False
    for gap in act(machine, step):
        found = True
        yield gap
    if not found:
        yield from compared(machine)


def act(machine: Machine, step: Step) -> Iterator[Gap]:
    """Do what a legal step says, to the bridge and to the state; the gaps of what came back."""
    machine.taken.append(step)
    yield from labelled(f"in {_last(machine)}", MOVES[step.kind].run(machine, step))


def compared(machine: Machine) -> Iterator[Gap]:
    """The gaps between the bridge and a fresh reference in the same state."""
    yield from labelled(f"after {_last(machine)}", invariant.gaps(machine))


def _last(machine: Machine) -> str:
    taken = machine.taken
    return f"step {len(taken)}, {taken[-1].kind}" if taken else "no step"
