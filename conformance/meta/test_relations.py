"""Roundings move the reference by little, and what is due is allowed that and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conformance.checks.compatibility import log_probabilities_of, probability_gaps
from conformance.checks.relations import (
    greatest_move,
    nudged,
    related_gaps,
    reweigh,
    underived,
)
from conformance.data import regressions
from conformance.observe import observe
from conformance.sites import observable
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.subjects import reference
from conformance.tolerance import of_rounding

torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other

MODEL = ModelSpec(num_hidden_layers=2, weight_seed=4)
CASE = Case(model=MODEL, run=RunSpec(batch=2, seq_len=6, token_seed=3, padding="right"))
SITES = observable(MODEL)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_nudged_run_is_off_by_roundings(dtype: str) -> None:
    case = replace(CASE, model=replace(MODEL, dtype=dtype))
    subject = reference(case.model)
    plain, moved = observe(subject, case, sites=SITES), nudged(subject, case, SITES)
    for name, value in plain.values.items():
        if name not in ("embed.hook_in",) and not SITES[name].derived:
            allowance = of_rounding(value, [run.values[name] for run in moved])
            assert 0 < allowance.atol < 1e-3, name
    assert not torch.equal(plain.logits, moved[0].logits)
    assert not any(run.gradients for run in moved)


def test_how_far_roundings_reach_is_known_of_each_case() -> None:
    (tiny,) = (record.case for record in regressions("decompositions.processed"))
    for case, low, high in ((CASE, 2, 200), (tiny, 1e3, 1e6)):  # behind a clip of 0.0015
        wanted = underived(observable(case.model))
        assert low < greatest_move(reference(case.model), case, wanted) < high


def test_processed_weights_may_round_otherwise_and_no_more() -> None:
    (hard,) = (record.case for record in regressions("compatibility.log_probabilities"))
    for case, slack in ((CASE, 4e-5), (hard, 1e-4)):  # rows of three nearly equal entries
        truth = reference(case.model)
        due = log_probabilities_of(observe(truth, case, backward=False).logits, case)
        assert not list(probability_gaps("it", due, due + slack, truth, case))
        (gap,) = probability_gaps("it", due, due + 10 * slack, truth, case)
        assert (gap.site, gap.kind) == ("it", "value")


def test_a_masked_score_does_not_count() -> None:
    scores = torch.tensor([1.0, torch.finfo(torch.float32).min])
    assert of_rounding(scores, [scores]).atol < 1e-6


def test_runs_that_are_not_related_are_told_apart() -> None:
    subject = reference(MODEL)
    plain, moved = observe(subject, CASE, sites=SITES), nudged(subject, CASE, SITES)
    off = replace(plain, logits=plain.logits * 1.0001)
    both = lambda name, kind, due, got: (due, got)  # noqa: E731
    assert not list(related_gaps(plain, plain, SITES, both))
    values_only = replace(plain, gradients={})
    assert not list(related_gaps(values_only, moved[0], SITES, both, moved=moved))
    (gap,) = related_gaps(plain, off, SITES, both, moved=moved, label="again: ")
    assert (gap.site, gap.kind) == ("again: logits", "value")
    less = replace(plain, values={**plain.values, "embed.hook_out": torch.zeros(1)})
    sliced = lambda name, kind, due, got: (due, got[:, 0])  # noqa: E731
    kinds = {gap.kind for gap in related_gaps(plain, less, SITES, sliced)}
    assert "shape" in kinds


def test_weights_are_changed_where_they_lie() -> None:
    subject = reference(MODEL)
    before = {name: id(parameter) for name, parameter in subject.parameters.items()}
    reweigh(subject, lambda name, weight: weight * (2 if "q_proj" in name else 1))
    assert before == {name: id(parameter) for name, parameter in subject.parameters.items()}
    fresh = reference(MODEL).parameters
    for name, parameter in subject.parameters.items():
        factor = 2 if "q_proj" in name else 1
        assert torch.equal(parameter, fresh[name] * factor)
