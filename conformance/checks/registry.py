"""The registry: every promise of the contract is one check, a plain function with a stable name."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hypothesis.strategies import SearchStrategy
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.compare import Gap
from conformance.spec import Case
from conformance.subjects import SubjectError
from conformance.verdict import ConformanceError, NotApplicable, Outcome, Verdict

Adapter = type[ArchitectureAdapter]
Judge = Callable[[Adapter, Case], Iterable[Gap]]


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        name: Stable name, ``surface.promise``.
        promise: What is promised, in one sentence: a row of the README's table.
        run: Yields the gaps of an adapter on a case. Raises `NotApplicable` where the promise says
            nothing, `SubjectError` where the subject breaks.
        cases: Makes the strategy of its cases.
        examples: Share of the profile's examples, by what the check can find.
        error: The exception of a failure, its own so that Hypothesis tells bugs apart.
    """

    name: str
    promise: str
    run: Judge
    cases: Callable[[], SearchStrategy[Case]]
    examples: float
    error: type[ConformanceError]

    def __str__(self) -> str:
        return self.name


REGISTRY: dict[str, Check] = {}


def check(
    name: str,
    promise: str,
    cases: Callable[[], SearchStrategy[Case]],
    *,
    examples: float = 1.0,
) -> Callable[[Judge], Check]:
    """Register a function as a check. See `Check` for the arguments."""

    def register(run: Judge) -> Check:
        words = name.replace(".", " ").replace("_", " ").title().replace(" ", "")
        error = type(f"{words}Error", (ConformanceError,), {"__module__": __name__})
        registered = Check(name, promise, run, cases, examples, error)
        assert name not in REGISTRY, f"two checks are called {name}"
        REGISTRY[name] = registered
        return registered

    return register


def adapter_name(adapter: Adapter) -> str:
    """``module:Class``, as ``--adapter`` takes it."""
    return f"{adapter.__module__}:{adapter.__qualname__}"


def judge(
    check: Check,
    adapter: Adapter,
    case: Case,
    *,
    found: Callable[[], Iterable[Gap]] | None = None,
) -> Verdict:
    """The verdict of one check on one case. A fault of the kit itself is raised, not judged.

    Args:
        check: What is judged.
        adapter: Whom.
        case: On what.
        found: Finds the gaps, where that is not a call of the check.
    """
    start = time.perf_counter()
    gaps: tuple[Gap, ...] = ()
    reason = ""
    try:
        with warnings.catch_warnings():
            # What a subject warns of is judged by the checks that are about it.
            warnings.simplefilter("ignore")
            gaps = tuple(found() if found is not None else check.run(adapter, case))
        outcome = Outcome.FAILED if gaps else Outcome.PASSED
    except NotApplicable as none:
        outcome, reason = Outcome.NOT_APPLICABLE, str(none)
    except SubjectError as broken:
        outcome, reason = Outcome.ERRORED, str(broken)
    seconds = time.perf_counter() - start
    name = adapter_name(adapter)
    return Verdict(check.name, name, outcome, case, gaps, reason, seconds=seconds)


def require(check: Check, adapter: Adapter, case: Case) -> Verdict:
    """As `judge`, but a verdict against the adapter is raised as the check's own error."""
    verdict = judge(check, adapter, case)
    if verdict.bad:
        raise check.error(verdict)
    return verdict
