"""One check on one adapter, case after case: what came of them, what was known of it, what was not.

A case all of whose disagreements are known does not end a search: the next case may show news.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from conformance.checks.registry import Adapter, Check, judge
from conformance.compare import Gap
from conformance.data import regressions
from conformance.defects import Known
from conformance.profiles import chosen_dtypes
from conformance.spec import Case
from conformance.verdict import Outcome, Verdict


class Trial:
    """The cases of one check, judged one at a time.

    Args:
        check: What is judged.
        adapter: Whom.
        known: What the ledger knows of it.
    """

    def __init__(self, check: Check, adapter: Adapter, known: Known | None = None) -> None:
        self.examples = 0
        self._check, self._adapter = check, adapter
        self._showings = known.showings if known is not None else ()
        self._known = Known(self._showings)
        self._met: set[int] = set()
        self._cases: Counter[str] = Counter()
        self._last: Verdict | None = None
        self._last_known: Verdict | None = None
        self._applied = False

    @property
    def firsts(self) -> list[Case]:
        """Cases to judge before any is drawn: those that once failed, and the known defects'."""
        once = [record.case for record in regressions(self._check.name)]
        return [*once, *(self._showings[index][1].witness for index in self._due)]

    @property
    def _due(self) -> list[int]:
        """The showings whose witness is of a dtype that this run is about."""
        dtypes = chosen_dtypes()
        return [
            index
            for index, (_, showing) in enumerate(self._showings)
            if showing.witness.model.dtype in dtypes
        ]

    @property
    def told(self) -> tuple[tuple[str, int], ...]:
        """The known defects that were met, each with the number of cases so far."""
        return tuple(sorted(self._cases.items()))

    def judge(self, case: Case) -> Verdict:
        """Judge one more case.

        Raises:
            ConformanceError: The check's own, if the case shows what the ledger does not know. The
                verdict that it carries has the gaps that are news, and no others.
        """
        self.examples += 1
        verdict = judge(self._check, self._adapter, case)
        self._applied |= verdict.outcome is not Outcome.NOT_APPLICABLE
        if verdict.bad:
            met, news = self._known.sort(case, verdict.gaps, verdict.reason)
            if news or not met:
                raise self._check.error(replace(verdict, gaps=news))
            ids = sorted({self._showings[index][0] for index in met})
            self._met.update(met)
            self._cases.update(ids)
            verdict = replace(
                verdict, outcome=Outcome.KNOWN, known=tuple((name, 1) for name in ids)
            )
            self._last_known = self._last_known or verdict
        self._last = verdict
        return verdict

    def verdict(self) -> Verdict:
        """What all cases came to; where some are known to fail, with the first of these.

        Raises:
            ConformanceError: The check's own, if a known defect has not shown.
        """
        assert self._last is not None, "a strategy that draws nothing"
        self._no_stale_entry()
        if self._last_known is not None:
            return replace(self._last_known, known=self.told)
        outcome = Outcome.PASSED if self._applied else Outcome.NOT_APPLICABLE
        return replace(self._last, outcome=outcome)

    def _no_stale_entry(self) -> None:
        assert self._last is not None
        stale = [self._showings[index] for index in self._due if index not in self._met]
        if not stale:
            return
        detail = "known, but it does not show any more: fixed upstream? update the ledger"
        gaps = tuple(Gap(f"known defect {name}", "missing", detail) for name, _ in stale)
        case, failed = stale[0][1].witness, Outcome.FAILED
        raise self._check.error(replace(self._last, outcome=failed, case=case, gaps=gaps))
