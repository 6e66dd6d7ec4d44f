"""torch.compile of a bridge and of a patched model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.forward import logits_gap
from conformance.checks.interventions import edited_runs
from conformance.checks.modes import DROPS, random_gap
from conformance.checks.patched import pairs
from conformance.checks.registry import Adapter, check
from conformance.checks.support import in_one_forward, sites_to_hook
from conformance.compare import Gap, compare_gradients, compare_parameters, compare_values, labelled
from conformance.observe import observe, sites_of
from conformance.recorder import Observation
from conformance.spec import Case
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import Subject, SubjectError, bridged, reference
from conformance.verdict import NotApplicable


def compiled_cases() -> SearchStrategy[Case]:
    """Cases of one layer, since tracing is slow, with an edit."""
    runs = partial(edited_runs, most=1)
    return cases(models=model_specs(layers=st.just(1), dropouts=DROPS), runs=runs)


@check(
    "compiled.bridge",
    "torch.compile of a bridge, with a backend that computes eagerly, gives the bridge's own "
    "values, gradients and firings, of hooks that were added since as well, or refuses with one "
    "clear error.",
    compiled_cases,
    examples=0.05,
)
def bridge(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Compiled before there is any hook; then everything is hooked, edited, and bare again."""
    case = in_one_forward(case)
    plain = replace(case, run=replace(case.run, edits=()))
    bare, edited = observe(reference(case.model), plain), reference(case.model)
    backend = "aot_eager" if case.run.token_seed % 2 else "eager"
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    module = torch.compile(subject.bridge, backend=backend)
    traced = replace(subject, bridge=module)  # type: ignore[arg-type]
    every, hooked = sites_of(subject, case), sites_to_hook(subject, case)
    expected = observe(edited, case, sites=every)
    try:
        actual = observe(traced, plain)
        yield from labelled("bare", logits_gap(bare, actual))
        yield from labelled("bare", compare_parameters(bare, actual))
        yield from labelled("bare", random_gap(bare, actual))
        actual = observe(traced, case, sites=hooked)
        yield from labelled("hooked", compare_values(expected, actual, every))
        yield from labelled("hooked", compare_gradients(expected, actual, hooked))
        yield from labelled("hooked", compare_parameters(expected, actual))
        yield from labelled("bare again", logits_gap(bare, observe(traced, plain)))
    except SubjectError as error:
        if not (isinstance(error.__cause__, NotImplementedError) and "compile" in str(error)):
            raise
    finally:
        torch.compiler.reset()


def traced_cases() -> SearchStrategy[Case]:
    """Cases of one layer with a clip that binds, without what Hugging Face breaks its graph at."""
    clips, ropes = st.sampled_from((0.2, 0.5, 1.0)), st.just("default")
    models = model_specs(layers=st.just(1), clips=clips, rope_types=ropes, dropouts=DROPS)
    runs = partial(
        run_specs, paddings=st.just("none"), positions=st.just("derived"), caches=st.just(False)
    )
    return cases(models=models, runs=runs)


def _traced(subject: Subject, case: Case) -> Observation:
    """What a Hugging Face model shows, compiled."""
    module: Any = torch.compile(subject.model, backend="eager")
    return observe(replace(subject, model=module), case)


@contextmanager
def _not_applicable(reason: str) -> Iterator[None]:
    """Say that the check does not apply if what is done in here raises."""
    try:
        yield
    except Exception as error:
        raise NotApplicable(reason) from error


@check(
    "compiled.patched",
    "torch.compile of a patched model, with a backend that computes eagerly, gives logits and "
    "gradients without the clamp, or with the exact one, as it does uncompiled.",
    traced_cases,
    examples=0.04,
)
def patched_model(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """In one mode of the patch a case, where Hugging Face's own model can be compiled at all."""
    every = list(pairs(adapter, case))
    label, truth, subject = every[case.run.token_seed % len(every)]
    expected = observe(truth, case)
    try:
        actual = _traced(subject, case)
    except SubjectError:
        with _not_applicable("Hugging Face's own model cannot be compiled here"):
            _traced(truth, case)
        raise
    finally:
        torch.compiler.reset()
    yield from labelled(label, logits_gap(expected, actual))
    yield from labelled(label, compare_parameters(expected, actual))
