"""Judge mutants: does the named check kill one, and after how many drawn cases?"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

from hypothesis import Phase, Verbosity, settings

from adapter import OlmoArchitectureAdapter
from conformance.checks import REGISTRY, judge, require
from conformance.draws import drawing
from conformance.mutants.catalogue import Mutant
from conformance.profiles import profile
from conformance.run import property_settings
from conformance.spec import Case
from conformance.verdict import ConformanceError, Outcome, Verdict


@dataclass(frozen=True)
class Kill:
    """What became of a mutant.

    Attributes:
        mutant: Who.
        verdict: Of the check on the case that killed it; None if it survived.
        cases: How many cases were judged.
        seconds: Time it took.
        sound: Of the check on the same case, without the mutant.
    """

    mutant: Mutant
    verdict: Verdict | None
    cases: int
    seconds: float
    sound: Verdict | None = None

    @property
    def killed(self) -> bool:
        """Whether the named check has found the fault, as what it is, and none without it."""
        if self.verdict is None or self.sound is None:
            return False
        told = self.verdict.outcome is Outcome.FAILED or self.mutant.crashes
        return told and self.sound.outcome is Outcome.PASSED

    @property
    def by(self) -> str | None:
        """The check that killed it."""
        return self.verdict.check if self.verdict is not None and self.killed else None

    def __str__(self) -> str:
        fate = f"killed by {self.by}" if self.killed else f"SURVIVED {self.mutant.killer}"
        if self.verdict is not None and not self.killed:
            fate = f"NOT KILLED: {self.mutant.killer} crashes, or is red without it too,"
        what = f": {self.verdict.summary}" if self.verdict is not None else ""
        return f"{self.mutant}: {fate} after {self.cases} cases, {self.seconds:.1f} s{what}"


class OutOfTime(Exception):  # noqa: N818 - no fault of anybody
    """A mutant has had its time."""


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` in here after so many seconds, also out of an endless loop."""
    if seconds is None:
        yield
        return

    def over(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kill(
    mutant: Mutant, *, examples: int | None = None, seed: int = 0, cap: float | None = None
) -> Kill:
    """Draw cases for the mutant's killer until one of them fails. Nothing is shrunk.

    Args:
        mutant: The mutant; it is applied meanwhile.
        examples: How many cases at most; the ``ci`` profile's for this check if None.
        seed: Seed of the draws. (Derandomized ones would change with every edit of this function.)
        cap: Seconds after which it counts as a survivor; needs the main thread of a POSIX process.
    """
    check, start = REGISTRY[mutant.killer], time.perf_counter()
    found: list[ConformanceError | OutOfTime] = []
    cases = 0

    def one(case: Case) -> None:
        nonlocal cases
        if found:  # Hypothesis runs a failure again, to be sure of it
            raise found[0]
        cases += 1
        try:
            require(check, OlmoArchitectureAdapter, case)
        except (ConformanceError, OutOfTime) as error:
            found.append(error)
            raise

    bound = settings(
        property_settings(check, profile("ci")),
        phases=(Phase.generate,),
        verbosity=Verbosity.quiet,
    )
    if examples is not None:
        bound = settings(bound, max_examples=examples)
    drawn = drawing(one, check.cases(), bound, seed=seed)
    with mutant.apply(), suppress(ConformanceError, OutOfTime), _limited(cap):
        drawn()
    seconds = time.perf_counter() - start
    verdict = next((end.verdict for end in found if isinstance(end, ConformanceError)), None)
    sound = None
    if verdict is not None and verdict.case is not None:
        sound = _on_the_sound_adapter(mutant.killer, verdict.case)
    return Kill(mutant, verdict, cases, seconds, sound)


@cache  # the same few cases kill most
def _on_the_sound_adapter(check: str, case: Case) -> Verdict:
    return judge(REGISTRY[check], OlmoArchitectureAdapter, case)
