"""How much a compared case costs, in units of what running it costs anyway."""

from __future__ import annotations

import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, settings

from conformance.checks.registry import Adapter
from conformance.checks.series import all_runs, built, gaps_of
from conformance.draws import drawing
from conformance.garbage import rarely_collected
from conformance.inputs import inputs
from conformance.observe import plain_run, sites_of
from conformance.spec import Case
from conformance.strategies import series
from conformance.subjects import redraw


@dataclass(frozen=True)
class Spread:
    """A number measured more than once."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of some values."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Bench:
    """What a bench measured. Times are CPU seconds of this process, whose one thread does all.

    Attributes:
        cases: Runs compared in each repeat.
        facts: Tensors of a subject under test that were compared with the reference's, likewise.
        shapes: How many of the cases' models differ in more than their weights.
        fresh_share: Share of the cases whose subjects were built for them.
        cases_per_second: Of everything: draw, build, observe, compare.
        floor: Milliseconds of bare forwards and backwards of a case's subjects, built before.
        ratio: Everything a case costs, by the floor of the same repeat.
        fresh_ratio: The same of the cases that were built afresh.
        split: Milliseconds a case, by stage.
        peak_memory: Greatest resident size of the process, in MiB.
    """

    cases: int
    facts: int
    shapes: int
    fresh_share: float
    cases_per_second: Spread
    floor: Spread
    ratio: Spread
    fresh_ratio: Spread
    split: dict[str, Spread]
    peak_memory: float


class _Clock:
    """Adds up the CPU time of stages."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def timed(self, *stages: str) -> Iterator[None]:
        start = time.process_time()
        yield
        spent = time.process_time() - start
        for stage in stages:
            self.seconds[stage] += spent  # type: ignore[assignment]


def drawn(examples: int, seed: int) -> list[Case]:
    """The series that the default suite's strategy draws from a seed."""
    found: list[Case] = []
    bound = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    drawing(lambda case: found.append(case), series(), bound, seed=seed)()
    return found


def _one_series(adapter: Adapter, case: Case, clock: _Clock) -> int:
    """Judge a series as `series.everything` does, by the clock; then its floor. Counts the facts.

    The floor's own subjects are built and filled off the clock.
    """
    facts = 0
    with clock.timed("build", "fresh"):
        subjects = built(adapter, case)
        sites = sites_of(subjects["bridged"], case)
    bare = built(adapter, case)
    runs = all_runs(subjects, case, sites)
    for number in range(1 + len(case.reruns)):
        first = ["fresh"] if number == 0 else []
        with clock.timed("observe", *first):
            its, seen = next(runs)
        with clock.timed("compare", *first):
            gaps = gaps_of(its, seen, sites)
        assert not any(gaps.values()), "bench an adapter that conforms"
        if number:
            redraw(bare.values(), its.model)
        for name, subject in bare.items():
            data = inputs(its)
            call = plain_run(subject, its, data)
            with clock.timed("floor", *(["fresh floor"] if number == 0 else [])):
                call()
            for parameter in subject.parameters.values():
                parameter.grad = None
            if name != "reference":
                facts += len(seen[name].values) + len(seen[name].gradients) + 1
                facts += sum(x is not None for x in seen[name].parameter_gradients.values())
    runs.close()  # type: ignore[attr-defined]
    return facts


def bench(
    adapter: Adapter,
    *,
    examples: int,
    repeats: int,
    seed: int = 0,
    each: Callable[[], None] = lambda: None,
) -> Bench:
    """Measure the price of a compared case.

    Args:
        adapter: Whose bridge is observed. It must conform.
        examples: How many series are drawn.
        repeats: How often all of them are measured, with other draws each time.
        seed: Seed of the first repeat's draws.
        each: Called after every series.
    """
    torch.set_num_threads(1)
    _one_series(adapter, drawn(1, seed)[0], _Clock())  # what is imported or cached at first use
    rarely_collected()
    clocks: list[_Clock] = []
    counts, facts, shapes = [], 0, set()
    for repeat in range(repeats):
        clock = _Clock()
        with clock.timed("draw"):
            found = drawn(examples, seed + repeat)
        facts = 0
        for case in found:
            facts += _one_series(adapter, case, clock)
            shapes.add(case.model.with_weights(0))
            each()
        clocks.append(clock)
        counts.append(sum(1 + len(case.reruns) for case in found))

    def spread(of: Callable[[Counter[str], int], float]) -> Spread:
        seconds = [(clock.seconds, count) for clock, count in zip(clocks, counts, strict=True)]
        return Spread.of([of(*each) for each in seconds])

    stages = ("draw", "build", "observe", "compare")

    def total(seconds: Any) -> float:
        return sum(float(seconds[stage]) for stage in stages)

    def fresh(seconds: Any, count: int) -> float:
        return float(seconds["fresh"] + seconds["draw"] * examples / count)

    return Bench(
        cases=counts[-1],
        facts=facts,
        shapes=len(shapes),
        fresh_share=examples * repeats / sum(counts),
        cases_per_second=spread(lambda s, n: n / total(s)),
        floor=spread(lambda s, n: 1e3 * float(s["floor"]) / n),
        ratio=spread(lambda s, n: total(s) / float(s["floor"])),
        fresh_ratio=spread(lambda s, n: fresh(s, n) / float(s["fresh floor"])),
        split={
            stage: spread(lambda s, n, stage=stage: 1e3 * float(s[stage]) / n)  # type: ignore[misc]
            for stage in stages
        },
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
