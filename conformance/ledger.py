"""The ledger of known defects, as a file. See `conformance.defects` for what an entry does.

``fixtures/known_defects.toml`` is data, never code, and this is all of its vocabulary::

    [[defect]]
    id = "float32-after-rope"         # stable
    title = "..."                     # what is wrong, as the title of an issue
    reason = "..."                    # why
    expected = "..."                  # what is due instead
    subject = "upstream"              # or "any": the bridge itself is at fault, whoever the adapter
    releases = ">=3.6"                # of transformer-lens, PEP 440
    first_seen = "3.6.0"
    issue = 1234                      # upstream's, if there is one
    catalogue = ["A05"]               # rows of the defect catalogue, if there are any
    reproducer = "reproducers/float32_after_rope.py"

    [[defect.shows]]                  # any number; one gap is explained by one of them
    promises = ["hooks.values"]       # checks that it turns red
    witness = { model = { dtype = "bfloat16" }, run = { use_cache = true } }  # a case that shows it
    case = { dtype = ["bfloat16", "float16"], grouped = true }  # what the case must be like
    edit = { site = ["*.hook_in"], kind = ["in_place"] }        # and one of its edits
    gap = { site = ["blocks.*.attn.hook_rot_?"], kind = ["dtype"], text = ["float32 instead"] }
    later = true                      # it explains what comes after such a gap, too
    error = ["must have the same dtype"]  # instead of `gap`: part of what the subject raises
    releases = "<4"                   # narrower than the defect's, if it shows so in some only

A field of ``case`` is one of the model's or run's spec, or ``grouped`` (fewer key-value heads than
heads), or ``square_o``, ``square_mlp``, ``square_unembed`` (a weight of two equal axes), or
``short`` (bfloat16 or float16, from the start or by a step that casts). Its condition is a list of
the values allowed (a field that is itself a list must hold one of them; of ``steps``, their kinds),
``{ not = [...] }``, or ``true`` and ``false``: another value than the field's default, and the
default. Of a text, ``*`` stands for anything and ``?`` for one character; in a gap's site
``{edit}`` stands for the site of one of the case's edits, one that meets ``edit``.

Light: no torch here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from conformance.data import FIXTURES
from conformance.defects import DEFAULTS, DERIVED, KINDS, SUBJECTS, Defect, Known, Showing
from conformance.fields import SpecError
from conformance.records import case_of
from conformance.spec import EDITS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LEDGER = FIXTURES / "known_defects.toml"


class _Reader:
    """Reads one table of the ledger and names the entry and the field in every complaint."""

    def __init__(self, where: str, body: Any, allowed: Iterable[str]) -> None:
        self.where, self.allowed = where, sorted(allowed)
        if not isinstance(body, dict):
            raise SpecError(where, body, "a table")
        self.body: dict[str, Any] = body
        for name in body:
            self.need(name in self.allowed, name, f"absent; known fields: {self.allowed}")

    def need(self, good: bool, name: str, allowed: str) -> None:
        if not good:
            raise self.bad(name, allowed)

    def bad(self, name: str, allowed: str) -> SpecError:
        return SpecError(f"{self.where}.{name}", self.body.get(name), allowed)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.body.get(name, default)
        self.need(isinstance(value, str) and (bool(value) or default == ""), name, "a text")
        return str(value)

    def texts(self, name: str, among: Iterable[str] | None = None) -> tuple[str, ...]:
        value = self.body.get(name, [])
        good = isinstance(value, list) and all(isinstance(each, str) for each in value)
        self.need(good and (name not in self.body or bool(value)), name, "a list of texts")
        if among is not None:
            self.need(set(value) <= set(among), name, f"a choice of {tuple(among)}")
        return tuple(value)

    def patterns(self, name: str, kinds: Iterable[str], *more: str) -> dict[str, tuple[str, ...]]:
        inner = _Reader(f"{self.where}.{name}", self.body.get(name, {}), ("site", "kind", *more))
        self.need(name not in self.body or bool(inner.body), name, "a table with something in it")
        choices = {"kind": tuple(kinds)}
        return {field: inner.texts(field, choices.get(field)) for field in inner.body}

    def releases(self, default: str | None = None) -> SpecifierSet:
        try:
            return SpecifierSet(self.text("releases", default))
        except InvalidSpecifier:
            raise self.bad("releases", "versions as PEP 440 has them") from None

    def version(self, name: str) -> Version:
        try:
            return Version(self.text(name))
        except InvalidVersion:
            raise self.bad(name, "a version as PEP 440 has it") from None


def _condition(reader: _Reader, name: str) -> Any:
    """Check the form of a condition. Whether it can ever hold is what the witness shows."""
    condition = reader.body[name]
    if name in DERIVED:
        reader.need(isinstance(condition, bool), name, "true or false")
        return condition
    inner = condition
    if isinstance(condition, dict):
        reader.need(set(condition) == {"not"}, name, "a list, { not = [...] }, true or false")
        inner = condition["not"]
    listed = isinstance(inner, list) and bool(inner)
    allowed = "a list, { not = [...] }, true or false"
    reader.need(listed or (isinstance(condition, bool)), name, allowed)
    return condition


def _showing(where: str, body: Any) -> Showing:
    reader = _Reader(where, body, (item.name for item in dataclasses.fields(Showing)))
    fields = _Reader(f"{where}.case", reader.body.get("case", {}), [*DEFAULTS, *DERIVED])
    later = reader.body.get("later", False)
    reader.need(isinstance(later, bool), "later", "true or false")
    reader.need(bool(reader.texts("promises")), "promises", "a list of checks")
    either = ("gap" in reader.body) != ("error" in reader.body)
    reader.need(either, "gap", "there, or error instead")
    showing = Showing(
        promises=reader.texts("promises"),
        witness=case_of(reader.body.get("witness"), f"{where}.witness"),
        case={name: _condition(fields, name) for name in fields.body},
        edit=reader.patterns("edit", EDITS),
        gap=reader.patterns("gap", KINDS, "text"),
        later=later,
        error=reader.texts("error"),
        releases=reader.releases(""),
    )
    allowed = "a case that meets the conditions of `case` and `edit`"
    reader.need(showing.meets(showing.witness), "witness", allowed)
    return showing


def _defect(where: str, body: Any) -> Defect:
    reader = _Reader(where, body, (item.name for item in dataclasses.fields(Defect)))
    issue, shows = reader.body.get("issue"), reader.body.get("shows", [])
    reader.need(issue is None or type(issue) is int, "issue", "a number of upstream's tracker")
    reader.need(isinstance(shows, list), "shows", "an array of tables")
    reader.need(reader.text("subject") in SUBJECTS, "subject", f"one of {SUBJECTS}")
    told = bool(shows) != ("trigger" in reader.body)
    reader.need(told, "shows", "there, or a trigger in words instead")
    return Defect(
        **{name: reader.text(name) for name in ("id", "title", "reason", "expected", "subject")},
        releases=reader.releases(),
        first_seen=reader.version("first_seen"),
        issue=issue,
        catalogue=reader.texts("catalogue"),
        reproducer=reader.text("reproducer", ""),
        trigger=reader.text("trigger", ""),
        shows=tuple(_showing(f"{where}.shows[{at}]", each) for at, each in enumerate(shows)),
    )


def read(text: str, source: str = "ledger") -> tuple[Defect, ...]:
    """Read a ledger.

    Raises:
        SpecError: If it is no TOML, or says something outside its vocabulary: with entry and field.
    """
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(source, text[:40], f"complete TOML ({error})") from None
    entries = _Reader(source, body, ("defect",)).body.get("defect", [])
    if not isinstance(entries, list):
        raise SpecError(f"{source}.defect", entries, "an array of tables")
    found: dict[str, Defect] = {}
    for at, entry in enumerate(entries):
        name = entry.get("id", at) if isinstance(entry, dict) else at
        defect = _defect(f"{source}[{name}]", entry)
        if defect.id in found:
            raise SpecError(f"{source}[{defect.id}].id", defect.id, "no other entry's")
        found[defect.id] = defect
    return tuple(found.values())


@cache
def ledger(path: Path = LEDGER) -> tuple[Defect, ...]:
    """Every known defect, of the fixtures' ledger if no other is named."""
    return read(path.read_text(encoding="utf-8"), path.name)


def known(
    check: str, *, upstream: bool, release: str | None, among: Iterable[Defect] | None = None
) -> Known:
    """What is known of a check.

    Args:
        check: Its name.
        upstream: Whether the adapter judged is transformer_lens' own.
        release: Of transformer_lens; None asks for every entry, whatever its range.
        among: A ledger; the fixtures' if None.
    """

    def within(releases: SpecifierSet) -> bool:
        return release is None or releases.contains(release, prereleases=True)

    return Known(
        tuple(
            (defect.id, showing)
            for defect in (ledger() if among is None else among)
            if within(defect.releases) and (upstream or defect.subject == "any")
            for showing in defect.shows
            if check in showing.promises and within(showing.releases)
        )
    )
