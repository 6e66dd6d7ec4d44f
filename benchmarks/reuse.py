"""Which mutants show on subjects that are built afresh for every run, and which on reused ones.

    python benchmarks/reuse.py [--series 3] [--jobs 2] [--journal FILE]

The same drawn runs are judged both ways, for every mutant of the catalogue: each run on subjects of
its own, and all runs of a series on the same ones. Reuse may show more, for some faults need a
second run; whatever it hides is printed, and is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from adapter import OlmoArchitectureAdapter
from conformance.bench import drawn
from conformance.checks import judge
from conformance.checks.series import everything
from conformance.cli.base import get_ready
from conformance.journal import Journal
from conformance.mutants import CATALOGUE
from conformance.parallel import each_done
from conformance.run import versions
from conformance.spec import Case


def afresh(case: Case) -> Iterator[Case]:
    """Each run of a series as a case of its own."""
    yield replace(case, reruns=())
    for again in case.reruns:
        yield Case(model=case.model.with_weights(again.weight_seed), run=again.run)


def shows(case: Case) -> bool:
    """Whether the adapter, as it is now, differs from the reference; a crash is a difference."""
    try:
        return judge(everything, OlmoArchitectureAdapter, case).bad
    except Exception:
        return True


def both_ways(task: tuple[str, int]) -> dict[str, bool]:
    """Whether a mutant shows, both ways."""
    name, examples = task
    cases = drawn(examples, seed=0)
    with CATALOGUE[name].apply():
        fresh = any(shows(its) for case in cases for its in afresh(case))
        return {"fresh": fresh, "reused": any(shows(case) for case in cases)}


def main() -> int:
    """Judge all, print the matrix, and fail if reuse hides a mutant."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--series", type=int, default=3)
    ask.add_argument("--jobs", type=int, default=2)
    ask.add_argument("--journal", type=Path)
    given = ask.parse_args()
    get_ready()
    sound = drawn(given.series, seed=0)
    if any(shows(case) for case in sound):
        sys.exit("the sound adapter differs from the reference: judge it first")
    known = Journal(given.journal, {"versions": versions(), "series": given.series})
    missing = [(name, given.series) for name in CATALOGUE if name not in known.results]
    work = each_done(both_ways, missing, jobs=given.jobs)
    for (name, _), result in track(work, "mutants", total=len(missing)):
        known.add(name, result)
    both = {
        (fresh, reused): sorted(
            name
            for name in CATALOGUE
            if (known.results[name]["fresh"], known.results[name]["reused"]) == (fresh, reused)
        )
        for fresh in (True, False)
        for reused in (True, False)
    }
    runs = sum(1 + len(case.reruns) for case in sound)
    print(f"{len(CATALOGUE)} mutants, the same {runs} runs of {len(sound)} series both ways:")
    print(f"  shown by fresh and by reused subjects: {len(both[True, True])}")
    print(f"  by neither (other checks kill them): {len(both[False, False])}")
    print(f"  by reused ones alone: {len(both[False, True])}: {', '.join(both[False, True])}")
    print(f"  by fresh ones alone: {len(both[True, False])}: {', '.join(both[True, False])}")
    return 1 if both[True, False] else 0


if __name__ == "__main__":
    sys.exit(main())
