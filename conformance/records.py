"""A case on file: plain JSON, validated, never code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from conformance.fields import SpecError, require
from conformance.spec import Case, Edit, ModelSpec, Rerun, RunSpec, Step

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """A case on file: with the check that it failed, the adapter judged and what was seen."""

    case: Case
    check: str
    adapter: str
    note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(isinstance(self.case, Case), "case", self.case, "a Case")
        good = isinstance(self.versions, Mapping)
        require(good, "versions", self.versions, "an object of names and versions")
        for name in ("check", "adapter", "note"):
            value = getattr(self, name)
            require(isinstance(value, str), name, value, "a string")

    def dumps(self) -> str:
        """The record as JSON, with the format's version first."""
        body = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(body, indent=2) + "\n"


_Spec = TypeVar("_Spec")


def _from_mapping(kind: type[_Spec], body: object, where: str) -> _Spec:
    """Build a spec of ``kind`` from decoded JSON, naming unknown fields and wrong types."""
    if not isinstance(body, dict):
        raise SpecError(where, body, "an object")
    known = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in body:
        require(name in known, f"{where}.{name}", body[name], f"absent; known fields: {known}")
    nested: dict[str, Any] = dict(body)
    kinds: dict[str, type] = {"model": ModelSpec, "run": RunSpec, "case": Case}
    for name in kinds.keys() & nested.keys():
        nested[name] = _from_mapping(kinds[name], nested[name], f"{where}.{name}")
    lists: dict[str, type] = {"edits": Edit, "steps": Step, "reruns": Rerun}
    for name in lists.keys() & nested.keys():
        require(isinstance(nested[name], list), f"{where}.{name}", nested[name], "a list")
        nested[name] = tuple(
            _from_mapping(lists[name], item, f"{where}.{name}[{index}]")
            for index, item in enumerate(nested[name])
        )
    try:
        return kind(**nested)
    except SpecError:
        raise
    except TypeError as error:
        raise SpecError(where, sorted(body), f"a complete {kind.__name__} ({error})") from None


def case_of(body: object, where: str = "case") -> Case:
    """Build a case from decoded JSON or TOML; whatever is left out has its default.

    Raises:
        SpecError: If it is no table, names an unknown field or holds a bad value.
    """
    return _from_mapping(Case, body, where)


def sparse(case: Case) -> dict[str, Any]:
    """A case as JSON has it, but only what differs from the defaults; `case_of` reads it."""
    return _differing(case)


def _differing(spec: Any) -> dict[str, Any]:
    """The fields of a spec that have no default, or another value than it."""
    found = {}
    for item in dataclasses.fields(spec):
        made = item.default_factory
        usual = item.default if made is dataclasses.MISSING else made()
        if (value := getattr(spec, item.name)) != usual:
            found[item.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return _differing(value) if dataclasses.is_dataclass(value) else value


def loads(text: str, source: str = "case") -> Record:
    """Read a record from JSON.

    Args:
        text: The JSON text.
        source: What to call it in an error, usually the file's name.

    Raises:
        SpecError: If it is no JSON, of a newer format, or holds a bad value.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(source, text[-40:], f"complete JSON ({error})") from None
    if not isinstance(body, dict):
        raise SpecError(source, body, "a JSON object")
    version = body.pop("format_version", None)
    allowed = f"{FORMAT_VERSION}: this version of olmo-conformance reads no other"
    good = type(version) is int and version == FORMAT_VERSION
    require(good, "format_version", version, allowed)
    return _from_mapping(Record, body, "record")


def load(path: Path) -> Record:
    """Read the record in a file. See `loads`; a file that cannot be read is a `SpecError` too."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError("file", str(path), f"a readable case file ({error})") from None
    return loads(text, path.name)
