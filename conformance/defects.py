"""What a known defect is, and which disagreements it explains.

An entry of the ledger does not excuse a test. It explains single gaps, by the promise they break
*and* by what triggers them, so that whatever else turns up in the same case is still red. Light: no
torch here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from conformance.spec import EDITS, Case, Edit, ModelSpec, RunSpec

if TYPE_CHECKING:
    from conformance.compare import Gap

SUBJECTS = ("upstream", "any")
KINDS = (
    *("missing", "extra", "order", "count", "shape", "dtype", "value", "gradient", "contract"),
)

DEFAULTS: dict[str, Any] = {
    item.name: item.default
    for kind in (ModelSpec, RunSpec)
    for item in dataclasses.fields(kind)
    if item.name != "edits"
}


def _of_model(holds: Callable[[ModelSpec], bool]) -> Callable[[Case], bool]:
    return lambda case: holds(case.model)


def _becomes_short(case: Case) -> bool:
    """Whether the model is, or a step of the state machine casts it to, bfloat16 or float16."""
    return bool({"bfloat16", "float16"} & {case.model.dtype, *(s.dtype for s in case.run.steps)})


DERIVED: dict[str, Callable[[Case], bool]] = {
    "grouped": _of_model(lambda model: model.num_key_value_heads < model.num_attention_heads),
    "square_o": _of_model(lambda m: m.num_attention_heads * m.d_head == m.hidden_size),
    "square_mlp": _of_model(lambda model: model.intermediate_size == model.hidden_size),
    "square_unembed": _of_model(lambda model: model.vocab_size == model.hidden_size),
    "short": _becomes_short,
}


def _matches(text: str, patterns: Iterable[str]) -> bool:
    """Whether a text is as one of the patterns says."""
    return any(_compiled(pattern).fullmatch(text) for pattern in patterns)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)


def _holds(condition: Any, value: Any, default: Any) -> bool:
    """Whether a value meets the condition on a field of that default."""
    if isinstance(condition, bool):
        return (value != default) is condition
    if isinstance(condition, dict):
        return not _holds(condition["not"], value, default)
    held = value if isinstance(value, tuple) else (value,)
    return any(each in condition for each in held)


@dataclass(frozen=True, kw_only=True)
class Showing:
    """One way in which a defect shows: under which promises, in which cases, as which gaps.

    Attributes:
        promises: Names of checks.
        witness: A case that shows it.
        case: Conditions on fields of the case; all must hold.
        edit: Patterns of ``site`` and a choice of ``kind``: one of the case's edits meets both.
        gap: Patterns of ``site`` and parts of ``text``, and a choice of ``kind``; all must hold. In
            a site, ``{edit}`` stands for that of an edit that meets ``edit``.
        later: Whether the gaps after such a one are explained by it as well.
        error: Parts of a subject's error, one of which it must have, instead of ``gap``.
        releases: In which of the defect's releases it shows so; in all of them if empty.
    """

    promises: tuple[str, ...]
    witness: Case
    case: Mapping[str, Any]
    edit: Mapping[str, tuple[str, ...]]
    gap: Mapping[str, tuple[str, ...]]
    later: bool
    error: tuple[str, ...]
    releases: SpecifierSet

    def meets(self, case: Case) -> bool:
        """Whether a case is one in which the defect can show."""
        for name, condition in self.case.items():
            if name in DERIVED:
                good = DERIVED[name](case) is condition
            else:
                owner = case.model if hasattr(case.model, name) else case.run
                value = getattr(owner, name)
                if name == "steps":
                    value = tuple(step.kind for step in value)
                good = _holds(condition, value, DEFAULTS[name])
            if not good:
                return False
        return not self.edit or any(self._is_edit(edit) for edit in case.run.edits)

    def _is_edit(self, edit: Edit) -> bool:
        sites, kinds = self.edit.get("site", ("*",)), self.edit.get("kind", EDITS)
        return _matches(edit.site, sites) and edit.kind in kinds

    def explains(self, gaps: Iterable[Gap], edits: Iterable[Edit] = ()) -> list[bool]:
        """Which of a case's gaps it explains.

        Args:
            gaps: The gaps, in the order of execution.
            edits: Of the case.
        """
        places = [edit.site for edit in edits if self._is_edit(edit)]
        sites = [
            pattern.replace("{edit}", place)
            for pattern in self.gap.get("site", ("*",))
            for place in (places if "{edit}" in pattern else ("",))
        ]
        explained: list[bool] = []
        for gap in gaps:
            after = self.later and any(explained)
            explained.append(after or self._is_gap(gap, sites))
        return explained

    def _is_gap(self, gap: Gap, sites: Iterable[str]) -> bool:
        texts = self.gap.get("text", ("",))
        return (
            bool(self.gap)
            and _matches(gap.site, sites)
            and gap.kind in self.gap.get("kind", KINDS)
            and any(text in gap.detail for text in texts)
        )

    def is_error(self, reason: str) -> bool:
        """Whether it explains what a subject raised."""
        return any(text in reason for text in self.error)


@dataclass(frozen=True, kw_only=True)
class Defect:
    """One entry. See the module's docstring; ``trigger`` is prose, where no check shows it yet."""

    id: str
    title: str
    reason: str
    expected: str
    subject: str
    releases: SpecifierSet
    first_seen: Version
    issue: int | None = None
    catalogue: tuple[str, ...] = ()
    reproducer: str = ""
    trigger: str = ""
    shows: tuple[Showing, ...] = ()

    @property
    def promises(self) -> tuple[str, ...]:
        """Every check that it turns red."""
        return tuple(dict.fromkeys(name for each in self.shows for name in each.promises))


@dataclass(frozen=True)
class Known:
    """What is known of one adapter, in one release, under one check.

    Attributes:
        showings: Each way in which a defect turns the check red, with the defect's id.
    """

    showings: tuple[tuple[str, Showing], ...] = ()

    def sort(
        self, case: Case, gaps: tuple[Gap, ...], reason: str
    ) -> tuple[list[int], tuple[Gap, ...]]:
        """Which showings explain something of a case, by index, and the gaps that none explains.

        Args:
            case: The case.
            gaps: Its gaps, in the order of execution.
            reason: What the subject raised, if it did.
        """
        met: list[int] = []
        explained = [False] * len(gaps)
        for index, (_, showing) in enumerate(self.showings):
            if not showing.meets(case):
                continue
            mine = showing.explains(gaps, case.run.edits)
            explained = [old or new for old, new in zip(explained, mine, strict=True)]
            if any(mine) or (reason and showing.is_error(reason)):
                met.append(index)
        return met, tuple(gap for gap, known in zip(gaps, explained, strict=True) if not known)
