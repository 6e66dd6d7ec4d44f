"""The modes of running, of a patched model: each as Hugging Face has it, clamp or none."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from conformance.checks.forward import logits_gap
from conformance.checks.frozen import freeze
from conformance.checks.modes import DROPS, checkpoint, random_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, in_one_forward, needs_patch
from conformance.compare import Gap, compare_gradients, compare_parameters, compare_values, labelled
from conformance.inputs import inputs
from conformance.observe import arguments, logits_of, module_of, observe
from conformance.recorder import Observation
from conformance.sites import Site, observable
from conformance.spec import Case
from conformance.strategies import cases, clip_present, model_specs, run_specs
from conformance.subjects import Subject, at_work, bridged, patched, reference, unpatcher
from conformance.verdict import NotApplicable

MODES = ("autocast", "checkpointing", "frozen", "deepcopy", "saved", "replaced")


def clipped_dropping_cases() -> SearchStrategy[Case]:
    """Cases with a clip and a dropout."""
    return cases(models=model_specs(clips=clip_present(), dropouts=DROPS))


def pairs(adapter: Adapter, case: Case) -> Iterator[tuple[str, Subject, Subject]]:
    """Each patched subject with a name, before it its truth: the reference with or without clip."""
    needs_patch(adapter)
    yield "patched", reference(case.model.without_clip()), patched(case.model, adapter)
    with suppress(NotApplicable):
        needs_patch(adapter, exact=True)
        yield "exact", reference(case.model), patched(case.model, adapter, exact_clip=True)


def _once(seen: Observation) -> Observation:
    """As if each place had been computed once: checkpointing computes again."""
    return replace(seen, fired=tuple(dict.fromkeys(seen.fired)))


def _everything(expected: Observation, actual: Observation, sites: dict[str, Site]) -> list[Gap]:
    expected, actual = _once(expected), _once(actual)
    return [
        *compare_values(expected, actual, sites, due=expected.fired),
        *compare_gradients(expected, actual, sites),
        *compare_parameters(expected, actual),
        *random_gap(expected, actual),
    ]


def _saved(model: nn.Module, case: Case) -> Any:
    """What torch.save, or pickle by any of its protocols, brings back of a model."""
    kept, protocol = io.BytesIO(), drawing(case)(pickle.HIGHEST_PROTOCOL + 2) - 1
    if protocol < 0:
        torch.save(model, kept)
        kept.seek(0)
        return torch.load(kept, weights_only=False)
    return pickle.loads(pickle.dumps(model, protocol))


def _copied(subject: Subject, adapter: Adapter, case: Case, mode: str) -> Subject:
    """A copy of a patched model as a subject of its own; the original's patch is undone."""
    model = copy.deepcopy(subject.model) if mode == "deepcopy" else _saved(subject.model, case)
    undo = unpatcher(adapter)
    if undo is not None:
        undo(subject.model)
    return replace(subject, model=model, parameters=dict(model.named_parameters()))


def _replaced(subject: Subject, case: Case) -> Subject:
    """The subject after a forward, one projection of its last attention another module since."""
    observe(subject, case)
    attention: Any = subject.model.model.layers[-1].self_attn
    name = f"{'qkvo'[drawing(case)(4)]}_proj"
    old = getattr(attention, name)
    new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(old.weight.flip(0))
    setattr(attention, name, new)
    return replace(subject, parameters=dict(subject.model.named_parameters()))


def _in_mode(mode: str, subject: Subject, case: Case, adapter: Adapter) -> Subject:
    """The subject as it is to run in a mode."""
    if mode == "checkpointing":
        checkpoint(subject, case)
    elif mode == "frozen":
        return freeze(subject, case)
    elif mode == "replaced":
        return _replaced(subject, case)
    elif mode in ("deepcopy", "saved") and subject.under_test:
        observe(subject, case)
        return _copied(subject, adapter, case, mode)
    return subject


@check(
    "patched.modes",
    "Under autocast, gradient checkpointing, with frozen parts, as a deep copy, once saved and "
    "loaded, and once a projection is replaced by another module, a patched model has the "
    "reference's values and gradients everywhere, with its clamp or without.",
    clipped_dropping_cases,
    examples=0.2,
)
def modes(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three of them a case, in both modes of the patch."""
    for mode in MODES[case.run.token_seed % 2 :: 2]:
        run = replace(case.run, chunks=1)
        if mode == "checkpointing":
            # Hugging Face takes the cache away from a checkpointed layer, and with it our tap.
            run = replace(run, training=True, use_cache=False)
        its, sites = replace(case, run=run), observable(case.model)
        for label, truth, subject in pairs(adapter, its):
            with at_work(mode):
                subject = _in_mode(mode, subject, its, adapter)
            truth = _in_mode(mode, truth, its, adapter)
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                due, bare = observe(truth, its), observe(subject, its)
                expected, actual = (observe(each, its, sites=sites) for each in (truth, subject))
            name = f"{label}, {mode}"
            yield from labelled(name, _everything(expected, actual, sites))
            yield from labelled(f"{name}, bare", compare_parameters(due, bare))


THREADS, CALLS = 4, 8


@contextmanager
def _switching_often() -> Iterator[None]:
    """Let Python change threads as often as it can while in here."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def threaded_cases() -> SearchStrategy[Case]:
    """Cases with a clip, without chance: PyTorch has one random state for all threads."""
    runs = partial(run_specs, trainings=st.just(False))
    return cases(models=model_specs(clips=clip_present()), runs=runs)


def _in_a_thread(subject: Subject, case: Case) -> Observation:
    """A forward and its gradients, which are given and not added to what all threads share."""
    logits = logits_of(module_of(subject)(**arguments(subject, case)))
    weights, probe = list(subject.parameters.values()), inputs(case).probe.to(logits.dtype)
    gradients = torch.autograd.grad(logits, weights, probe, allow_unused=True)
    by_name = dict(zip(subject.parameters, gradients, strict=True))
    return Observation(logits.detach(), parameter_gradients=by_name)


@check(
    "patched.threads",
    "Forwards and gradients of a patched or a bridged model in four threads at once are the "
    "reference's, each.",
    threaded_cases,
    examples=0.12,
)
def threads(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The patch covers what all threads share for as long as one of them is inside."""
    case = in_one_forward(case)
    subjects = [("bridged", reference(case.model), bridged(case.model, adapter))]
    with suppress(NotApplicable):
        subjects += pairs(adapter, case)
    for label, truth, subject in subjects:
        expected = observe(truth, case)
        module_of(subject).eval()
        with at_work("one thread"):
            _in_a_thread(subject, case)
        try:
            with _switching_often(), ThreadPoolExecutor(THREADS) as pool:
                results = list(pool.map(_in_a_thread, (subject,) * CALLS, (case,) * CALLS))
        except Exception as error:  # of a subject that runs alone: which one is a matter of chance
            yield Gap(f"{label}: several threads", "contract", f"{type(error).__name__}: {error}")
            continue
        for actual in results:
            yield from labelled(label, logits_gap(expected, actual))
            yield from labelled(label, compare_parameters(expected, actual))
