"""Gradients: of every parameter, through the patch, and at full backward hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from conformance.checks.registry import Adapter, check
from conformance.checks.support import everywhere_gaps, needs_patch
from conformance.compare import (
    Gap,
    compare_gradients,
    compare_parameters,
    compare_tensors,
    compare_values,
)
from conformance.observe import observe
from conformance.recorder import Observation
from conformance.sites import Site, observable
from conformance.spec import Case
from conformance.strategies import cases, clipped_cases
from conformance.subjects import Subject, bridged, patched, reference
from conformance.tolerance import exactly
from conformance.verdict import NotApplicable


@check(
    "gradients.parameters",
    "Every parameter of the bridged model has the reference's gradient, and no other is trained.",
    cases,
)
def parameters(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bare forward and backward of both."""
    expected = observe(reference(case.model), case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    yield from compare_parameters(expected, observe(subject, case))
    assert subject.bridge is not None
    known = {id(parameter) for parameter in subject.parameters.values()}
    for name, parameter in subject.bridge.named_parameters():
        if id(parameter) not in known:
            yield Gap(name, "extra", "a trainable tensor that Hugging Face's model has not")


def _all_gaps(expected: Observation, actual: Observation, wanted: dict[str, Site]) -> Iterator[Gap]:
    yield from compare_values(expected, actual, wanted, due=expected.fired)
    yield from compare_gradients(expected, actual, wanted)
    yield from compare_parameters(expected, actual)


@check(
    "gradients.everywhere",
    "With a forward and a backward hook on every site at once, all values, all gradients and all "
    "parameter gradients are still the reference's.",
    cases,
    examples=0.5,
)
def everywhere(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One forward and backward with everything on it, but the LayerNorms' derived sites."""
    case = replace(case, run=replace(case.run, chunks=1))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    yield from everywhere_gaps(reference(case.model), subject, case)


@check(
    "gradients.patched",
    "A patched model has the values and gradients of the reference without its clamp at every "
    "place, and at every parameter.",
    cases,
    examples=0.5,
)
def patched_default(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Both are Hugging Face models: taps everywhere, in one forward and backward."""
    needs_patch(adapter)
    case = replace(case, run=replace(case.run, chunks=1))
    wanted = observable(case.model)
    without = reference(case.model.without_clip())
    expected = observe(without, case, sites=wanted)
    yield from _all_gaps(
        expected, observe(patched(case.model, adapter), case, sites=wanted), wanted
    )


@check(
    "gradients.patched_exact",
    "A model patched with exact_clip=True has the reference's values and gradients everywhere.",
    cases,
    examples=0.5,
)
def patched_exact(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """As for the default, against the clamping reference."""
    needs_patch(adapter, exact=True)
    case = replace(case, run=replace(case.run, chunks=1))
    wanted = observable(case.model)
    expected = observe(reference(case.model), case, sites=wanted)
    actual = observe(patched(case.model, adapter, exact_clip=True), case, sites=wanted)
    yield from _all_gaps(expected, actual, wanted)


def _projections(subject: Subject) -> dict[str, nn.Module]:
    """The Hugging Face projections of a subject by hook name, bridged away or not."""
    found = {}
    for index in range(subject.model.config.num_hidden_layers):
        for letter in "qkv":
            if subject.bridge is not None:
                wrapped = getattr(subject.bridge.blocks[index].attn, letter)
                module = wrapped.original_component
            else:
                module = getattr(subject.model.model.layers[index].self_attn, f"{letter}_proj")
            found[f"blocks.{index}.attn.{letter}.hook_out"] = module
    return found


def _fully_hooked(subject: Subject, case: Case) -> dict[str, list[torch.Tensor]]:
    """What full backward hooks on the projections themselves see of their outputs."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in _projections(subject).items():
        calls = seen[name] = []

        def hook(
            _: nn.Module,
            into: object,
            out: tuple[torch.Tensor, ...],
            calls: list[torch.Tensor] = calls,
        ) -> None:
            calls.append(out[0].detach().clone())

        handles.append(module.register_full_backward_hook(hook))
    try:
        observe(subject, case)
    finally:
        for handle in handles:
            handle.remove()
    return seen


IN_PLACE_ERROR = "is a view and is being modified inplace"


@check(
    "gradients.full_backward_hooks",
    "Full backward hooks on q, k and v, which crash the raw model with a clip, fire once on the "
    "patched and the bridged model, with the gradient of the projection before its clamp.",
    clipped_cases,
    examples=0.5,
)
def full_backward_hooks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """PyTorch's in-place error on the raw model is the reason the patch exists: it is shown."""
    case = replace(case, run=replace(case.run, chunks=1))
    try:
        _fully_hooked(reference(case.model), case)
    except RuntimeError as error:
        if IN_PLACE_ERROR not in str(error):
            raise
    else:
        raise NotApplicable("this PyTorch lets Hugging Face clamp in place under a backward hook")

    def gaps(subject: Subject, truth: Subject, name: str) -> Iterator[Gap]:
        wanted = observable(case.model)
        expected = observe(truth, case, sites=wanted).gradients
        for site, calls in _fully_hooked(subject, case).items():
            if len(calls) != 1:
                yield Gap(f"{name}: {site}", "count", f"fired {len(calls)} times instead of once")
                continue
            due = expected[site].flatten(-2)
            label = f"{name}: {site}"
            gap = compare_tensors(label, due, calls[0], exactly(due.dtype), kind="gradient")
            yield from [gap] if gap else []

    prepared = case.run.prepared
    truth = reference(case.model)
    yield from gaps(bridged(case.model, adapter, prepared=prepared), truth, "bridged")
    try:
        needs_patch(adapter)
        without = reference(case.model.without_clip())
        yield from gaps(patched(case.model, adapter), without, "patched")
        needs_patch(adapter, exact=True)
        yield from gaps(patched(case.model, adapter, exact_clip=True), truth, "patched exact")
    except NotApplicable:
        return
