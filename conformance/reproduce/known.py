"""The script that the ledger keeps of a known defect, for a case that shows nothing newer."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.data import FIXTURES
from conformance.defects import Defect, Known, Showing
from conformance.ledger import ledger
from conformance.verdict import Verdict


@dataclass(frozen=True)
class Kept:
    """A known defect that explains the first disagreement of a verdict, and its script."""

    defect: Defect
    script: str


def kept_of(verdict: Verdict, known: Known, asked: Showing | None = None) -> Kept | None:
    """The script of the known defect behind a verdict's first disagreement, if there is one.

    Args:
        verdict: A bad one, on a case.
        known: What the ledger knows of the check and the adapter.
        asked: The showing that the case is the witness of: where several defects explain the
            disagreement, its own goes first.
    """
    assert verdict.case is not None
    met, news = known.sort(verdict.case, verdict.gaps[:1], verdict.reason)
    ids = {known.showings[index][0] for index in met} if not news else set()
    for defect in sorted(ledger(), key=lambda each: asked not in each.shows):
        if defect.id in ids and defect.reproducer:
            script = (FIXTURES / defect.reproducer).read_text(encoding="utf-8")
            return Kept(defect, script)
    return None
