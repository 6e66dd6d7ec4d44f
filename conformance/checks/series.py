"""Everything at once, run after run: the kit's widest comparison, on subjects that stay built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

from conformance.checks.registry import Adapter, check
from conformance.checks.support import has_exact
from conformance.compare import Gap, compare_gradients, compare_parameters, compare_values
from conformance.inputs import inputs
from conformance.observe import observe, sites_of, watched
from conformance.recorder import Observation
from conformance.sites import Site
from conformance.spec import Case
from conformance.strategies import series
from conformance.subjects import Subject, SubjectError, bridged, patched, redraw, reference


def built(adapter: Adapter, case: Case) -> dict[str, Subject]:
    """The reference and every subject under test, by name."""
    found = {
        "reference": reference(case.model),
        "bridged": bridged(case.model, adapter, prepared=case.run.prepared),
    }
    if has_exact(adapter):
        found["patched"] = patched(case.model, adapter, exact_clip=True)
    return found


def every_gap(
    expected: Observation, actual: Observation, sites: Mapping[str, Site], case: Case, name: str
) -> Iterator[Gap]:
    """All gaps between two observations of one run."""
    # Taps fire in an order of their own; what is due of a bridge is the table's.
    due = expected.fired if name == "patched" else ()
    yield from compare_values(expected, actual, sites, due=due)
    if case.run.chunks == 1:
        yield from compare_gradients(expected, actual, sites)
    yield from compare_parameters(expected, actual)


def all_runs(
    subjects: Mapping[str, Subject], case: Case, sites: Mapping[str, Site]
) -> Iterator[tuple[Case, dict[str, Observation]]]:
    """What every subject shows in each run of a series; they end with the last run's weights.

    In the first run, backward hooks see the gradients on the bridge. In the others they are those
    of what the forward hooks return.
    """
    d_head = case.model.d_head
    its = replace(case, reruns=())
    yield its, {name: observe(subject, its, sites=sites) for name, subject in subjects.items()}
    if not case.reruns:
        return
    with ExitStack() as stack:
        look = {
            name: stack.enter_context(watched(subject, d_head, sites=sites, returned=True))
            for name, subject in subjects.items()
        }
        for again in case.reruns:
            its = Case(model=case.model.with_weights(again.weight_seed), run=again.run)
            redraw(subjects.values(), its.model)
            data = inputs(its)
            yield its, {name: watch(its, data) for name, watch in look.items()}


def gaps_of(
    its: Case, seen: Mapping[str, Observation], sites: Mapping[str, Site]
) -> dict[str, tuple[Gap, ...]]:
    """All gaps of one run, by subject under test."""
    expected = seen["reference"]
    return {
        name: tuple(every_gap(expected, actual, sites, its, name))
        for name, actual in seen.items()
        if name != "reference"
    }


def series_gaps(adapter: Adapter, case: Case, *, derived: bool) -> list[Gap]:
    """All gaps of all runs of a series."""
    subjects = built(adapter, case)
    every = sites_of(subjects["bridged"], case)
    wanted = {name: site for name, site in every.items() if derived or not site.derived}
    left_out = every.keys() - wanted.keys()

    def judged(seen: Observation) -> Observation:
        fired = (name for name in seen.fired if name.split("#")[0] not in left_out)
        return replace(seen, fired=tuple(fired))

    found = []
    for number, (its, seen) in enumerate(all_runs(subjects, case, wanted)):
        all_gaps = gaps_of(its, {name: judged(each) for name, each in seen.items()}, wanted)
        for name, gaps in all_gaps.items():
            found += [replace(gap, site=f"run {number}, {name}: {gap.site}") for gap in gaps]
    return found


@check(
    "series.everything",
    "Run after run of the same bridge, each with other weights, inputs and modes, every value, "
    "every gradient and every parameter's gradient of the bridged and of the exactly patched model "
    "is the reference's.",
    series,
    examples=0.25,
)
def everything(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """What one run leaves behind in a bridge shows in the next."""
    try:
        yield from series_gaps(adapter, case, derived=True)
    except SubjectError:
        # Backward hooks inside of a LayerNorm crash some bridges, which is `layernorm.observed`'s
        # to say. All the rest is judged here.
        yield from series_gaps(adapter, case, derived=False)
