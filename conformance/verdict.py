"""What is said of one case under one check, and the errors that carry it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from conformance.compare import Gap
from conformance.profiles import FAILURES
from conformance.records import Record
from conformance.spec import Case


class Outcome(Enum):
    """The five things that can be said of a subject."""

    PASSED = "passed"
    KNOWN = "known"  # it fails, but only as the ledger of known defects says
    FAILED = "failed"
    ERRORED = "errored"
    NOT_APPLICABLE = "not applicable"


class NotApplicable(Exception):  # noqa: N818 - no fault of anybody
    """The check has nothing to judge of this adapter, whatever the case: the reason says why."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check, on one case or on all that were drawn.

    Attributes:
        check: Name of the check.
        adapter: ``module:Class`` of the adapter judged.
        outcome: What came of it.
        case: The case it came of: the smallest failing one, or the last that passed.
        gaps: All disagreements, in the order of execution.
        reason: Why it errored or does not apply.
        known: The known defects that it showed, each with the number of cases.
        examples: How many cases were judged.
        seconds: Time it took.
    """

    check: str
    adapter: str
    outcome: Outcome
    case: Case | None = None
    gaps: tuple[Gap, ...] = ()
    reason: str = ""
    known: tuple[tuple[str, int], ...] = ()
    examples: int = 1
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether the adapter does not conform."""
        return self.outcome in (Outcome.FAILED, Outcome.ERRORED)

    @property
    def known_as(self) -> str:
        """The known defects that it showed, in words."""
        return ", ".join(f"{name} in {count}" for name, count in self.known)

    @property
    def summary(self) -> str:
        """The first gap, and how many more there are; or the reason."""
        if not self.gaps:
            return self.reason
        first = self.gaps[0]
        later = len({gap.site for gap in self.gaps} - {first.site})
        others = f"; {later} later site{'s differ' if later > 1 else ' differs'}" if later else ""
        return f"{first}{others}"

    def record(self, versions: dict[str, str] | None = None) -> Record:
        """The verdict's case as it is put on file."""
        assert self.case is not None, "only a verdict on a case can be recorded"
        return Record(
            case=self.case,
            check=self.check,
            adapter=self.adapter,
            note=self.summary,
            versions=versions or {},
        )

    @property
    def file_name(self) -> str:
        """Name of the case file that this verdict's replay line points to."""
        return f"{self.check}.json"


class ConformanceError(AssertionError):
    """A verdict against the adapter. Each check raises a subclass of its own.

    Hypothesis tells bugs apart by the type and place of the exception.
    """

    def __init__(self, verdict: Verdict, folder: str = FAILURES) -> None:
        self.verdict, self.folder = verdict, folder
        super().__init__(
            f"{verdict.summary}; replay: olmo-conformance replay {folder}/{verdict.file_name}"
        )

    def __reduce__(self) -> tuple[type[ConformanceError], tuple[Verdict, str]]:
        """Pickle by the parts: pytest-xdist sends exceptions between processes."""
        return ConformanceError, (self.verdict, self.folder)
