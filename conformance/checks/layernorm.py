"""The hooks inside a LayerNorm, which upstream's OLMo cannot edit or hook backwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.compare import (
    Gap,
    compare_gradients,
    compare_parameters,
    compare_tensors,
    compare_values,
)
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.sites import Site, observable
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import WIDE_DTYPES, cases, edits, model_specs, run_specs
from conformance.subjects import at_work, bridged, reference
from conformance.tolerance import of_second_derivative

_HOOKS = ("hook_scale", "hook_normalized")


def _inside(model: ModelSpec) -> list[str]:
    return [name for name in observable(model) if name.endswith(_HOOKS)]


def norm_edits() -> SearchStrategy[Case]:
    """Cases with one edit inside a LayerNorm, returned or in place."""

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        # A scale of zero divides by it on both sides: NaN everywhere shows nothing.
        kinds = st.sampled_from(("scale", "noise", "in_place"))
        one = edits(sites=st.sampled_from(_inside(model)), kinds=kinds)
        return run_specs(model, edits=st.tuples(one))

    return cases(runs=runs)


def wide_models() -> SearchStrategy[ModelSpec]:
    """Float32 and float64 models: rounding to fewer bits has no second derivative worth the name.

    Of at least eight entries a position: two are normalized to plus and minus 1 whatever they are,
    and of a derivative by a few there is little left but rounding.
    """
    shapes = st.sampled_from(("divided", "stated"))
    return model_specs(dtypes=WIDE_DTYPES, head_dims=st.just(8), geometries=shapes)


def wide_cases() -> SearchStrategy[Case]:
    """Cases of `wide_models`."""
    return cases(models=wide_models())


@check(
    "layernorm.observed",
    "With forward and backward hooks on hook_scale and hook_normalized of every LayerNorm, these "
    "see their gradients, and every other value and gradient stays the reference's.",
    cases,
    examples=0.5,
)
def observed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Everything hooked, both ways."""
    case = replace(case, run=replace(case.run, chunks=1))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=every)
    actual = observe(subject, case, sites=every)
    yield from compare_values(expected, actual, every)
    yield from compare_gradients(expected, actual, every)
    yield from compare_parameters(expected, actual)


@check(
    "layernorm.edits",
    "An edit of hook_scale or hook_normalized, returned or in place, has the effect that it has in "
    "a LayerNorm computed from scratch.",
    norm_edits,
    examples=0.8,
)
def edited(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Values, logits and, where the edit is returned, the gradients of all parameters."""
    in_place = case.run.edits[0].kind == "in_place"
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=every, backward=not in_place)
    actual = observe(subject, case, sites=every, backward=not in_place, gradients_at=frozenset())
    yield from compare_values(expected, actual, every)
    yield from compare_parameters(expected, actual)


def _norm_of(case: Case) -> dict[str, Site]:
    return {
        name: site for name, site in observable(case.model).items() if name in _inside(case.model)
    }


@check(
    "layernorm.second_derivatives",
    "While the LayerNorms' hooks are on, double backward gives the reference's second derivatives, "
    "or is refused.",
    wide_cases,
    examples=0.2,
)
def second_derivatives(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The gradient of a squared gradient, by the embedding: every LayerNorm is on its way."""
    run = replace(case.run, chunks=1, training=False, use_cache=False, padding="none")
    case = replace(case, run=run)
    data = inputs(case)

    def second(logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seeded = (logits * data.probe.to(logits.dtype)).sum()
        (first,) = torch.autograd.grad(seeded, weight, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), weight)[0]

    given: dict[str, Any] = {"use_cache": False}
    if data.position_ids is not None:
        given["position_ids"] = data.position_ids
    truth = reference(case.model)
    name = "model.embed_tokens.weight"
    expected = second(truth.model(data.tokens, **given).logits, truth.parameters[name])
    subject = bridged(case.model, adapter, prepared=run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    with at_work("double backward with hooks on the LayerNorms"):
        for site in _norm_of(case):
            bridge.hook_dict[site].add_hook(lambda tensor, hook: None)
            bridge.hook_dict[site].add_hook(lambda tensor, hook: None, dir="bwd")
        logits = bridge(data.tokens, return_type="logits", **given)
        try:
            actual = second(logits, subject.parameters[name])
        except (RuntimeError, NotImplementedError) as refusal:
            if "double backward" in str(refusal) or "differentiated twice" in str(refusal):
                return
            raise
    allowance = of_second_derivative(expected)
    gap = compare_tensors("second derivative", expected, actual, allowance, kind="gradient")
    yield from [gap] if gap else []


@check(
    "layernorm.incl_bwd",
    "run_with_cache(incl_bwd=True), unfiltered, has every site's value and gradient.",
    cases,
    examples=0.3,
)
def incl_bwd(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """As a researcher calls it: the loss is the bridge's own, so gradients are only counted."""
    case = replace(case, run=replace(case.run, chunks=1, positions="derived", padding="none"))
    if case.run.seq_len == 1:
        return  # no next token, no loss
    data = inputs(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    subject.bridge.train(case.run.training)
    with at_work("run_with_cache(incl_bwd=True)"):
        _, cache = subject.bridge.run_with_cache(
            data.tokens, return_type="loss", incl_bwd=True, use_cache=case.run.use_cache
        )
    wanted = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=wanted)
    for name in wanted:
        if name not in cache:
            yield Gap(name, "missing", "not in the cache")
        if name in expected.gradients and f"{name}_grad" not in cache:
            yield Gap(f"{name}_grad", "missing", "not in the cache")
