"""A bridge that is taken through states in any order always is what its state says."""

from __future__ import annotations

from collections.abc import Iterator

from conformance.checks.registry import Adapter, check
from conformance.compare import Gap
from conformance.machine import Machine, take
from conformance.machine.drawing import sequences
from conformance.spec import Case


@check(
    "machine.steps",
    "After any steps in any order (hooks, flags, modes, dtypes, weights, copies, compatibility "
    "mode, forwards, backwards, generation, hooks that raise) a bridge equals a fresh reference in "
    "the same state.",
    sequences,
    examples=0.4,
)
def steps(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Step by step until one leaves a gap. ``suite/test_machine.py`` drives the same machine."""
    machine = Machine(adapter, case)
    for step in case.run.steps:
        gaps = list(take(machine, step))
        yield from gaps
        if gaps:
            return
