"""The hooks of a bridge: that they fire, what they carry, and the gradients they see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing
from conformance.compare import Gap, compare_gradients, compare_values, labelled
from conformance.observe import observe, sites_of
from conformance.points import hook_points
from conformance.recorder import Recorder
from conformance.sites import Status, sites
from conformance.spec import Case
from conformance.strategies import cases, model_specs
from conformance.subjects import at_work, bridged, reference


@check(
    "hooks.values",
    "Every hook fires exactly once, in order, and carries the tensor that Hugging Face computes "
    "there: value, layout and dtype.",
    cases,
    examples=1.5,
)
def values(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """All hooks of a bridge at once; observing them changes no logit."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    wanted = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=wanted, backward=False)
    actual = observe(subject, case, sites=wanted, backward=False)
    yield from compare_values(expected, actual, wanted)


@check(
    "hooks.gradients",
    "Every backward hook fires exactly once and sees the gradient that the reference has there; so "
    "do register_hook, in a forward hook that returns nothing, and autograd.grad of what it sees.",
    cases,
    examples=1.5,
)
def gradients(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every site but the LayerNorms' derived ones, which have a check, in one of three ways."""
    case = replace(case, run=replace(case.run, chunks=1))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    wanted = {name: site for name, site in sites_of(subject, case).items() if not site.derived}
    expected = observe(reference(case.model), case, sites=wanted)
    recorder, way = Recorder(), drawing(case)(3)
    recorder.asking, recorder.hooking = way > 0, way > 1
    actual = observe(subject, case, sites=wanted, recorder=recorder)
    gaps = compare_gradients(expected, actual, wanted)
    yield from labelled("asked for", gaps) if recorder.asking else gaps


def deep_cases() -> SearchStrategy[Case]:
    """Cases of which some have eleven blocks: the last one has a number of two digits."""
    return cases(models=model_specs(layers=st.sampled_from((1, 1, 1, 2, 2, 2, 3, 3, 3, 11))))


@check(
    "hooks.names",
    "Every hook of the table is there under its canonical name and all of its aliases, knows "
    "its layer, and no other is.",
    deep_cases,
    examples=0.3,
)
def names(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The aliases are the same hook point, not another one that fires too."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    known, wanted = sites(case.model), sites_of(subject, case)
    by_name, points = subject.bridge.hook_dict, hook_points(subject)
    for name, site in known.items():
        if site.status is Status.DEAD and name not in points:
            continue
        if site.status is Status.OPTIONAL and name not in wanted and name not in points:
            continue
        if name not in points:
            yield Gap(name, "missing", "no hook point of this name")
            continue
        if name.startswith("blocks."):
            with at_work(f"layer() of {name}"):
                layer = points[name].layer()  # type: ignore[no-untyped-call]
            if layer != int(name.split(".")[1]):
                yield Gap(f"{name}, layer()", "contract", f"says {layer}")
        for alias in site.aliases:
            if by_name.get(alias) is not points[name]:
                yield Gap(alias, "missing", f"is not another name of {name}")
    for name in points.keys() - known.keys():
        yield Gap(name, "extra", "a hook point that neither the contract nor the adapter declares")
