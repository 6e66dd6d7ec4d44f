"""Second derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    drawing,
    forward_as_it_is,
    in_one_forward,
    sites_to_hook,
)
from conformance.compare import Gap, bitwise
from conformance.edits import edited
from conformance.inputs import inputs
from conformance.observe import module_of
from conformance.points import hook_points
from conformance.spec import Case, Edit
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.taps import Taps


def bent_cases() -> SearchStrategy[Case]:
    """Cases most of which clip."""
    clips = st.sampled_from((1.0, 0.5, 1.5, 0.2, None))
    return cases(models=model_specs(clips=clips))


def _hessian_times(subject: Subject, case: Case) -> dict[str, torch.Tensor | None]:
    """The second derivative of the probed logits by all parameters, in a drawn direction."""
    module_of(subject).train(case.run.training)
    logits, _ = forward_as_it_is(subject, case)
    weights = list(subject.parameters.values())
    probed = (logits * inputs(case).probe.to(logits.dtype)).sum()
    draw = torch.Generator().manual_seed(case.run.token_seed)
    ways = [torch.randn(weight.shape, generator=draw).to(weight.dtype) for weight in weights]
    firsts = torch.autograd.grad(probed, weights, create_graph=True, allow_unused=True)
    along = [
        (first * way).sum() for first, way in zip(firsts, ways, strict=True) if first is not None
    ]
    seconds = torch.autograd.grad(torch.stack(along).sum(), weights, allow_unused=True)
    return dict(zip(subject.parameters, seconds, strict=True))


class _Tripled(torch.autograd.Function):
    """The same tensor, whose gradient is three times as great."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Not in place: it has a derivative too."""
        return gradients[0] * 3


@contextmanager
def watched(
    subject: Subject, case: Case, edit: Edit | None = None, *, tripled: str = ""
) -> Iterator[None]:
    """Look at every site while in here, by the subject's own means, and edit one of them.

    The reference is watched, too, and not bare: a node at each site, as a hook makes one, changes
    the order in which PyTorch adds up a second derivative.

    Args:
        subject: The subject.
        case: The case, which says where the sites are.
        edit: What is done at one of them.
        tripled: A site whose gradient is replaced by three times itself; if there is one, every
            hook of a bridge has a backward hook beside it.
    """

    def visit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if subject.bridge is None and name == tripled:
            tensor = _Tripled.apply(tensor)  # type: ignore[no-untyped-call]
        return edited(edit, tensor) if edit is not None and name == edit.site else tensor

    sites = sites_to_hook(subject, case)
    if subject.bridge is None:
        d_head, clamps = case.model.d_head, subject.clamps
        with Taps(subject.model, sites, visit, d_head=d_head, clamps=clamps).attached():
            yield
        return
    points = hook_points(subject)
    try:
        for name in sites:
            points[name].add_hook(lambda tensor, hook, name=name: visit(name, tensor))
            if name == tripled:
                points[name].add_hook(lambda tensor, hook: tensor * 3, dir="bwd")
            elif tripled:
                points[name].add_hook(lambda tensor, hook: None, dir="bwd")
        yield
    finally:
        for point in points.values():
            point.remove_hooks("both")


@check(
    "derivatives.second",
    "Hessian-vector products through the logits, clamp and all, are the reference's for every "
    "parameter, bare and with forward and backward hooks on every site, one of which returns "
    "another gradient.",
    bent_cases,
    examples=0.25,
)
def second(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The hooks inside of the LayerNorms are left out: they have a check of their own."""
    case = in_one_forward(case)
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    # Not past the clamp: taps on what is clamped in place lose such a node in the second pass.
    sites = [name for name in sites_to_hook(subject, case) if not name.endswith("_clipped")]
    site = sites[drawing(case)(len(sites))]
    for label in ("bare", "hooked"):
        with watched(truth, case, tripled=site) if label == "hooked" else nullcontext():
            expected = _hessian_times(truth, case)
        with (
            at_work(f"double backward, {label}"),
            watched(subject, case, tripled=site) if label == "hooked" else nullcontext(),
        ):
            actual = _hessian_times(subject, case)
        for name, due in expected.items():
            got = actual[name]
            if due is not None and got is not None:
                yield from bitwise(f"{label}: {name}", due, got, kind="gradient")
            elif due is not got:
                has = "missing" if got is None else "extra"
                yield Gap(f"{label}: {name}", has, "a second derivative on one side only")
