"""Subjects that stay built show what freshly built ones show, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given, settings

from adapter import OlmoArchitectureAdapter
from conformance.checks.series import all_runs, built, gaps_of
from conformance.inputs import inputs
from conformance.observe import observe, sites_of, watched
from conformance.recorder import Observation
from conformance.spec import Case, ModelSpec, Rerun, RunSpec
from conformance.strategies import MOST_RERUNS, series


def same_tensors(
    first: Mapping[str, torch.Tensor | None], second: Mapping[str, torch.Tensor | None]
) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        if tensor is None or other is None:
            assert tensor is other, name
        else:
            assert tensor.dtype == other.dtype, name
            torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True, msg=name)


def same(first: Observation, second: Observation) -> None:
    assert first.fired == second.fired
    same_tensors({"logits": first.logits}, {"logits": second.logits})
    same_tensors(first.values, second.values)
    same_tensors(first.gradients, second.gradients)
    same_tensors(first.parameter_gradients, second.parameter_gradients)


@settings(derandomize=True, database=None, deadline=None, max_examples=5)
@given(series())
def test_a_reused_and_a_fresh_build_show_the_same(case: Case) -> None:
    case = replace(case, reruns=case.reruns[::5])
    subjects = built(OlmoArchitectureAdapter, case)
    sites = sites_of(subjects["bridged"], case)
    for its, seen in all_runs(subjects, case, sites):
        fresh = built(OlmoArchitectureAdapter, replace(its, run=replace(its.run, prepared=True)))
        for name, subject in fresh.items():
            same(seen[name], observe(subject, its, sites=sites))


def test_a_value_is_what_the_hook_was_shown_though_it_is_overwritten_later() -> None:
    case = Case(run=RunSpec(seq_len=3))
    subject = built(OlmoArchitectureAdapter, case)["bridged"]
    assert subject.bridge is not None
    sites, site = sites_of(subject, case), "blocks.0.mlp.hook_out"
    with watched(subject, case.model.d_head, sites=sites, returned=True) as look:
        before = look(case, inputs(case))
        point = subject.bridge.hook_dict[site]
        point.register_forward_hook(lambda module, args, out: out.mul_(2))
        after = look(case, inputs(case))
    assert torch.equal(after.values[site], before.values[site])
    assert not torch.equal(after.logits, before.logits)
    assert after.fired == before.fired


def test_runs_have_weights_of_their_own_and_the_last_ones_stay() -> None:
    model, run = ModelSpec(weight_seed=1), RunSpec(seq_len=3)
    case = Case(model=model, run=run, reruns=(Rerun(weight_seed=2, run=run),) * 2)
    subjects = built(OlmoArchitectureAdapter, case)
    sites = sites_of(subjects["bridged"], case)
    logits = [seen["bridged"].logits for _, seen in all_runs(subjects, case, sites)]
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])
    again = built(OlmoArchitectureAdapter, replace(case, model=model.with_weights(2)))
    for name, subject in subjects.items():
        for key, parameter in subject.parameters.items():
            assert torch.equal(parameter, again[name].parameters[key]), (name, key)


def test_a_gap_in_any_run_is_found() -> None:
    run = RunSpec(seq_len=3)
    case = Case(run=run, reruns=tuple(Rerun(weight_seed=n, run=run) for n in (5, 6)))
    subjects = built(OlmoArchitectureAdapter, case)
    sites = sites_of(subjects["bridged"], case)
    found = []
    for its, seen in all_runs(subjects, case, sites):
        found.append(any(gaps_of(its, seen, sites).values()))
        if its.model.weight_seed == 5:  # spoilt between two runs: redrawn weights do not mend it
            subjects["bridged"].model.config.clip_qkv = 0.01
    assert found == [False, False, True]


def test_most_series_are_long() -> None:
    lengths = []

    @settings(derandomize=True, database=None, deadline=None, max_examples=40)
    @given(series())
    def draw(case: Case) -> None:
        lengths.append(len(case.reruns))
        modes = [rerun.run.training for rerun in case.reruns]
        assert sum(a != b for a, b in pairwise(modes)) <= 1

    draw()
    share = len(lengths) / sum(1 + n for n in lengths)
    assert max(lengths) == MOST_RERUNS
    assert 0.05 <= share < 0.08, share  # built afresh: at least one case in twenty, few more
