"""This kit and TransformerLens' own benchmark suite, side by side on the same broken bridges.

    python benchmarks/peers.py [--model fixtures/trained] [--every 8] [--jobs 2] [--journal FILE]

`run_benchmark_suite` (its phases 1 to 3; the fourth needs a judge model) is run on a saved tiny
OLMo, sound and with mutants of the catalogue. The kit gets the wall time that it took: one drawn
case of every check in turn, then another, until something differs or the time is over. Imports are
not counted for either. The suite compares with a Hugging Face model that it hands to
`prepare_model`, which by its contract skips the clamp: here it gets the exact patch, so that its
reference is right.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.progress import track

import adapter
from conformance.bench import bench
from conformance.checks import REGISTRY
from conformance.cli.base import get_ready
from conformance.journal import Journal
from conformance.mutants import CATALOGUE
from conformance.parallel import each_done
from conformance.profiles import Profile
from conformance.run import run_check, versions

# What the suite compares with Hugging Face. All else is compared with the bridge itself, or only
# asked whether it exists, runs, or has an effect.
AGAINST_HUGGING_FACE = ("forward_pass_logits", "logits_equivalence", "loss_equivalence")
ONE_CASE = Profile("one case", 1, deterministic=False, stores=False)
MODEL = Path(__file__).parents[1] / "fixtures" / "trained"


@contextmanager
def exact_reference() -> Iterator[None]:
    """`prepare_model` as the suite needs it."""
    prepare = adapter.OlmoArchitectureAdapter.prepare_model

    def exact(self: Any, hf_model: Any) -> None:
        prepare(self, hf_model, exact_clip=True)

    with patch.object(adapter.OlmoArchitectureAdapter, "prepare_model", exact):
        yield


def suite_results(model: str) -> dict[tuple[Any, ...], Any]:
    """What TransformerLens' suite says of a model, by phase and name."""
    from transformer_lens.benchmarks.main_benchmark import run_benchmark_suite

    with exact_reference(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        found = run_benchmark_suite(model, verbose=False, phases=[1, 2, 3])
    seen: Counter[Any] = Counter()
    results = {}
    for result in found:
        key = (result.phase, result.name)
        seen[key] += 1
        results[(*key, seen[key])] = result
    return results


def good(results: dict[tuple[Any, ...], Any]) -> set[tuple[Any, ...]]:
    """The results that say that all is well."""
    return {key for key, result in results.items() if result.passed}


def facts_of(results: dict[tuple[Any, ...], Any]) -> int:
    """How many tensors the suite compared with Hugging Face's."""
    components = [r for (_, name, _), r in results.items() if name == "all_components"]
    outputs = sum(int(result.details["total_components"]) for result in components)
    return outputs + sum(name in AGAINST_HUGGING_FACE for _, name, _ in results)


def by_the_kit(seconds: float) -> str | None:
    """The first check that differs, in so much time."""
    over, seed = time.perf_counter() + seconds, 0
    while True:
        for check in REGISTRY.values():
            if time.perf_counter() > over:
                return None
            if run_check(check, adapter.OlmoArchitectureAdapter, on=ONE_CASE, seed=seed).bad:
                return check.name
        seed += 1


def both(task: tuple[str, str, float, frozenset[tuple[Any, ...]]]) -> dict[str, Any]:
    """Whether each notices a mutant."""
    name, model, seconds, sound = task
    adapter.register()
    with CATALOGUE[name].apply():
        try:
            suite = not sound <= good(suite_results(model))
        except Exception:
            suite = True
        try:
            kit = by_the_kit(seconds)
        except Exception as error:
            kit = f"a {type(error).__name__} in the kit"
    return {"suite": suite, "kit": kit}


def main() -> None:
    """Measure, break, and print the table."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--model", default=str(MODEL))
    ask.add_argument("--every", type=int, default=8, help="of the catalogue's mutants")
    ask.add_argument("--jobs", type=int, default=2)
    ask.add_argument("--journal", type=Path)
    given = ask.parse_args()
    get_ready()
    adapter.register()
    suite_results(given.model)  # what is imported and cached at first use
    times = []
    for _ in range(3):
        start = time.perf_counter()
        results = suite_results(given.model)
        times.append(time.perf_counter() - start)
    seconds, facts = statistics.median(times), facts_of(results)
    kit = bench(adapter.OlmoArchitectureAdapter, examples=10, repeats=3)
    sound = frozenset(good(results))
    if bad := by_the_kit(seconds):
        sys.exit(f"the sound adapter fails {bad}: judge it first")

    names = list(CATALOGUE)[:: given.every]
    known = Journal(given.journal, {"versions": versions(), "model": given.model})
    tasks = [(n, given.model, seconds, sound) for n in names if n not in known.results]
    work = each_done(both, tasks, jobs=given.jobs)
    for (name, *_), result in track(work, "mutants", total=len(tasks)):
        known.add(name, result)
    by_suite = [name for name in names if known.results[name]["suite"]]
    by_kit = [name for name in names if known.results[name]["kit"]]
    rate = kit.facts / kit.cases * kit.cases_per_second.median
    facts_told = f"{facts / seconds:.0f} | {rate:.0f}"
    print("| | run_benchmark_suite | olmo-conformance |\n|---|---|---|")
    print(f"| checks | {len(results)}, {len(sound)} pass | {len(REGISTRY)} |")
    print(f"| tensors compared with Hugging Face's, a second | {facts_told} |")
    noticed = f"{len(by_suite)} | {len(by_kit)}"
    print(f"| of {len(names)} mutants noticed in {seconds:.1f} s | {noticed} |")
    alone, neither = {*by_suite} - {*by_kit}, {*names} - {*by_suite, *by_kit}
    print(f"noticed by the suite alone: {', '.join(sorted(alone)) or 'none'}")
    print(f"by neither, in that time: {', '.join(sorted(neither)) or 'none'}")


if __name__ == "__main__":
    main()
