"""A file of results, a line each as soon as it is known: an interrupted run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conformance.fields import SpecError


class Journal:
    """Results by key, kept in a file of JSON lines if there is one.

    The first line says what the results depend on: versions, options, whom they are about. Results
    that were got otherwise are not comparable, so such a file is refused.

    Args:
        path: The file; None keeps nothing.
        about: What all results depend on.

    Attributes:
        results: What is known, of earlier runs too.

    Raises:
        SpecError: If the file is no journal, or about something else.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self._path = path
        if path is None:
            return
        first = json.dumps({"about": about}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not lines:
            path.write_text(first + "\n", encoding="utf-8")
        elif lines[0] != first:
            allowed = f"a journal of the same run, which begins with {first}; or name a new file"
            raise SpecError("journal", str(path), allowed)
        for number, line in enumerate(lines[1:], start=2):
            try:
                entry = json.loads(line)
                self.results[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):
                if number == len(lines):  # cut off while it was written: that result is to be got
                    self._drop_last(lines)
                    break
                where = f"{path}, line {number}"
                raise SpecError("journal", where, "a key and its result in JSON") from None

    def _drop_last(self, lines: list[str]) -> None:
        assert self._path is not None
        self._path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep a result."""
        self.results[key] = dict(result)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}, sort_keys=True) + "\n")
