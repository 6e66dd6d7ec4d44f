"""Find a recorded case: in a file of its own, in the ledger, or in the history. No torch here.

``case.json`` is a case file; ``known_defects.toml#float32-after-rope`` is the first witness of a
known defect, ``known_defects.toml#float32-after-rope/hooks.values`` the one of that check; and
``history.json#3.6.0/hooks.values`` is the case behind a red cell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.defects import Showing
from conformance.fields import SpecError
from conformance.history import table
from conformance.ledger import ledger
from conformance.records import Record, load

if TYPE_CHECKING:
    from conformance.verdict import Verdict


@dataclass(frozen=True)
class Found:
    """A recorded case.

    Attributes:
        record: It.
        title: What it shows, in words, where that is known.
        reason: Why.
        expected: What is due instead.
        showing: What the ledger says of it, where it was found there.
    """

    record: Record
    title: str = ""
    reason: str = ""
    expected: str = ""
    showing: Showing | None = None

    def of_defect(self, verdict: Verdict) -> Verdict:
        """The verdict with those gaps only that are the known defect's, if it is one's witness."""
        if self.showing is None:
            return verdict
        mine = self.showing.explains(verdict.gaps)
        gaps = tuple(gap for gap, known in zip(verdict.gaps, mine, strict=True) if known)
        return replace(verdict, gaps=gaps or verdict.gaps)


def _witness(path: Path, key: str) -> Found:
    name, _, check = key.partition("/")
    defects = {defect.id: defect for defect in ledger(path) if defect.shows}
    if name not in defects:
        raise SpecError("defect", name, f"one of {list(defects)}")
    defect = defects[name]
    check = check or defect.promises[0]
    if check not in defect.promises:
        raise SpecError("check", check, f"one of {list(defect.promises)}")
    showing = next(each for each in defect.shows if check in each.promises)
    record = Record(case=showing.witness, check=check, adapter="upstream", note=defect.title)
    return Found(record, defect.title, defect.reason, defect.expected, showing)


def find(where: str) -> Found:
    """What is recorded at a place.

    Args:
        where: A path, followed by ``#`` and what is meant in the file, unless it is a case file.

    Raises:
        SpecError: If there is no such file, or nothing of that name in it.
    """
    name, mark, key = where.partition("#")
    path = Path(name)
    if not mark:
        return Found(load(path))
    try:
        if path.suffix == ".toml":
            return _witness(path, key)
        release, _, check = key.partition("/")
        return Found(table.record(table.load(path), release, check))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError("file", name, f"a ledger or a history ({error})") from None
