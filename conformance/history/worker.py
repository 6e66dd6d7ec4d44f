"""The process that judges one release: one line of JSON an event, so that nothing is lost.

    python -m conformance.history.worker FILE EXAMPLES CHECK...

It appends to FILE ``{"ready": versions}``, then ``{"starting": check}`` and ``{"check": check,
"cell": ...}`` of each check. Which transformer_lens it judges is PYTHONPATH's matter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.history.table import KIT_FAILED, RED, Cell
from conformance.profiles import PROFILES
from conformance.records import sparse

if TYPE_CHECKING:
    from conformance.verdict import Verdict


def cell_of(verdict: Verdict) -> Cell:
    """What the table keeps of a verdict."""
    outcome = verdict.outcome.value
    cell = {
        "outcome": outcome,
        "examples": verdict.examples,
        "told": verdict.summary,
        "known": dict(verdict.known),
    }
    if outcome in RED and verdict.case is not None:
        cell["case"] = sparse(verdict.case)
    return cell


def main(file: Path, examples: int, names: list[str]) -> None:
    """Judge upstream's adapter under some checks."""

    def tell(**event: Any) -> None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(event) + "\n")

    from conformance.checks import REGISTRY
    from conformance.run import known_of, load_adapter, run_check, versions

    adapter = load_adapter("upstream")
    on = replace(PROFILES["ci"], examples=examples)
    tell(ready=versions())
    for name in names:
        tell(starting=name)
        check = REGISTRY[name]
        try:
            verdict = run_check(check, adapter, on=on, known=known_of(check, adapter))
            tell(check=name, cell=cell_of(verdict))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            tell(check=name, cell={"outcome": KIT_FAILED, "examples": 0, "told": told, "known": {}})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
