"""The flags of a bridge as a state: refused where illegal, copied with it, kept when processed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from conformance.checks.compatibility import log_probabilities_of, probability_gaps, process
from conformance.checks.flags import RETURNED, gate_edits
from conformance.checks.forked import edit_behind_flags, edited_gaps, without_edits
from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    bridge_of,
    copied,
    drawing,
    in_one_forward,
    turn,
)
from conformance.compare import Gap
from conformance.forks import Forks
from conformance.observe import observe, sites_of
from conformance.points import hook_points
from conformance.sites import behind_flags
from conformance.spec import EXCLUSIVE, FLAGS, Case, Edit, ModelSpec, RunSpec
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, SubjectError, bridged, reference

# Flags that need the weight of a projection, with its name and that of the hook behind the flag.
_READERS = (
    ("use_attn_result", "o", "hook_result"),
    ("use_split_qkv_input", "q", "hook_q_input"),
    ("use_split_qkv_input", "v", "hook_v_input"),
    ("use_attn_in", "v", "hook_attn_in"),
)


def _flags_of(subject: Subject) -> dict[str, bool]:
    bridge = bridge_of(subject)
    return {flag: bool(getattr(bridge.cfg, flag)) for flag in FLAGS}


class _Doubled(nn.Module):
    """A projection that is twice another, whose weight it shows, as LoRA's layers show theirs."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        """Of what is doubled."""
        return self.base_layer.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> torch.Tensor | None:
        """Of what is doubled."""
        return self.base_layer.bias  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the output."""
        return 2 * self.base_layer(x)  # type: ignore[no-any-return]


class _DoubledLinear(nn.Linear):
    """A linear map of a kind of its own, as those that quantize in training are."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Twice the output."""
        return 2 * super().forward(input)


def _of_its_kind(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = _DoubledLinear
    return linear


class _Twice(nn.Module):
    """A parametrization: twice what is held."""

    def forward(self, held: torch.Tensor) -> torch.Tensor:
        """Twice the tensor."""
        return 2 * held


def _parametrized(linear: nn.Linear) -> nn.Linear:
    """The same projection, which holds half of its weight and bias from now on."""
    for name in [name for name, _ in linear.named_parameters()]:
        register_parametrization(linear, name, _Twice())
    return linear


def _wrapped_gaps(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One doubled projection, beside a bridge whose weight is doubled: no edit tells them apart."""
    draw = drawing(case)
    flag, letter, gate = _READERS[draw(len(_READERS))]
    block = draw(case.model.num_hidden_layers)
    path = f"blocks.{block}.attn.{letter}"
    edit = Edit(site=f"blocks.{block}.attn.{gate}", kind="noise", seed=draw(2**16))
    case = in_one_forward(case, edits=(edit,))
    doubled, wrapped = (bridged(case.model, adapter, prepared=case.run.prepared) for _ in range(2))
    with torch.no_grad():
        for tensor in bridge_of(doubled).get_submodule(path).original_component.parameters():
            tensor.mul_(2)
    component: Any = bridge_of(wrapped).get_submodule(path)
    how: Any = (_Doubled, _parametrized, _of_its_kind)[draw(3)]
    component.set_original_component(how(component.original_component))
    bare = without_edits(case)
    for subject in (doubled, wrapped):
        turn(subject, (flag,), True)
        edit_behind_flags(subject, case)
    due = observe(doubled, bare, sites={}, backward=False)
    try:
        got = observe(wrapped, bare, sites={}, backward=False)
    except SubjectError:
        return  # refused
    yield from logits_gap(due, got, f"logits, {path} wrapped, under {flag}")


def _both_gaps(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """An edit behind a flag, and one of what the projection behind it reads: neither is dropped."""
    draw = drawing(case)
    flag, letter, gated = _READERS[1:][draw(3)]  # not what heads write: nothing reads that
    attention = f"blocks.{draw(case.model.num_hidden_layers)}.attn"
    gate, read, shown = (
        f"{attention}.{name}" for name in (gated, f"{letter}.hook_in", f"{letter}.hook_out")
    )
    edits = [Edit(site=gate, kind="noise", seed=draw(2**16)), Edit(site=read, kind="scale", seed=3)]
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    turn(subject, (flag,), True)
    every = {**sites_of(subject, case), **behind_flags(case.model, (flag,))}
    sites = {name: every[name] for name in (gate, read, shown)}

    def projected(*made: Edit) -> torch.Tensor:
        its = in_one_forward(case, edits=made)
        return observe(subject, its, sites=sites, backward=False).values[shown]

    none, first, second = projected(), projected(edits[0]), projected(edits[1])
    try:
        both = projected(*edits)
    except SubjectError as error:
        if not re.search(rf"\b{letter}(_proj)?\b", str(error)):
            raise  # no refusal: it does not say of what
        return
    for dropped, alone, other in ((read, second, first), (gate, first, second)):
        if torch.equal(both, other) and not torch.equal(none, alone):
            yield Gap(shown, "contract", f"of two edits, the one at {dropped} is dropped")


@check(
    "flags.refused",
    "Asking for use_attn_in and use_split_qkv_input together is refused with an error that names "
    "both, and leaves the flags, hooks and logits as they were. An edit behind a flag that needs "
    "the weight of a projection that computes more than that, or its weight from another, is "
    "refused or takes account of it. "
    "Edits both behind a flag and of what the projection reads are both felt, or refused.",
    cases,
    examples=0.2,
)
def refused(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """In either order, by set_use_* and on cfg; and legal once the first is off."""
    yield from _wrapped_gaps(adapter, case)
    yield from _both_gaps(adapter, case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    by_cfg = bool(case.run.token_seed % 2)
    first, second = sorted(EXCLUSIVE, reverse=bool(case.run.token_seed // 2 % 2))
    turn(subject, [first], True, by_cfg=by_cfg)
    before, had = observe(subject, case, sites={}, backward=False), _flags_of(subject)
    bridge = bridge_of(subject)
    try:
        if by_cfg:
            setattr(bridge.cfg, second, True)
        else:
            getattr(bridge, f"set_{second}")(True)
    except Exception as error:
        if not all(flag in str(error) for flag in EXCLUSIVE):
            yield Gap(second, "contract", f"refused without naming both flags: {error}")
    else:
        yield Gap(second, "contract", f"was not refused while {first} is on")
    if _flags_of(subject) != had:
        yield Gap(second, "contract", f"refused, but the flags are now {_flags_of(subject)}")
    after = observe(subject, case, sites={}, backward=False)
    yield from logits_gap(before, after, "logits after a refusal")
    for name in sorted(set(before.fired) ^ set(after.fired)):
        yield Gap(name, "contract", "fires before a refusal or after it, but not both times")
    turn(subject, [first], False, by_cfg=by_cfg)
    turn(subject, [second], True, by_cfg=by_cfg)


@check(
    "flags.copies",
    "copy.deepcopy of a bridge takes its flags along; those of the copy are its own from then on, "
    "and edits behind them act on the copy, and on the copy alone.",
    lambda: cases(runs=gate_edits),
    examples=0.15,
)
def copies(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Copied before or after a forward; flags turned on before copying, or on the copy alone."""
    taken_along, used = bool(case.run.token_seed % 2), bool(case.run.token_seed // 2 % 2)
    by_cfg = bool(case.run.token_seed // 4 % 2)
    original = bridged(case.model, adapter, prepared=case.run.prepared)
    if taken_along:
        turn(original, case.run.flags, True)
    if used:
        observe(original, without_edits(case), backward=False)
    twin = copied(original)
    if taken_along:
        turn(original, case.run.flags, False)
    else:
        turn(twin, case.run.flags, True, by_cfg=by_cfg)
    crossed: list[str] = []
    points = hook_points(original)
    for name, point in points.items():
        point.add_hook(lambda tensor, hook, name=name: crossed.append(name))
    for gap in edited_gaps(adapter, twin, case):
        yield replace(gap, site=f"copy: {gap.site}")
    for subject, name, on in ((twin, "copy", case.run.flags), (original, "original", ())):
        wrong = [flag for flag, is_on in _flags_of(subject).items() if is_on != (flag in on)]
        if wrong:
            yield Gap(f"{name}: cfg", "contract", f"{wrong} do not say what they were set to")
    if crossed:
        yield Gap(crossed[0], "contract", "a hook of the original fired in a forward of its copy")
    for point in points.values():
        point.remove_hooks("both")
    bare = without_edits(case)
    expected = observe(reference(case.model), bare)
    actual = observe(original, bare, sites={})
    yield from logits_gap(expected, actual, "original: logits")
    for name in sorted(behind_flags(case.model, case.run.flags).keys() & set(actual.fired)):
        yield Gap(f"original: {name}", "extra", "fires, though only the copy has its flag")


def processed_edits() -> SearchStrategy[Case]:
    """Float32 cases with edits behind flags and any processing that keeps what heads write."""
    # Not fold_value_biases: it takes a part of what each head writes into the output's bias.
    kept = ("fold_ln", "center_writing_weights", "center_unembed")
    sets = [some for size in range(1 + len(kept)) for some in combinations(kept, size)]
    # Not one_head: of a tensor with no heads it clears one entry, which a centered one has not.
    kinds = tuple(kind for kind in RETURNED if kind != "one_head")

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        return st.builds(
            lambda run, processing: replace(run, processing=processing, training=False),
            gate_edits(model, kinds=kinds),
            st.sampled_from(sets),
        )

    return cases(models=model_specs(dtypes=st.just("float32")), runs=runs)


@check(
    "flags.compatibility",
    "In compatibility mode too, flags leave the log-probabilities as they are, and an edit behind "
    "one has the effect that it has in a computation from scratch of the unprocessed model.",
    processed_edits,
    examples=0.2,
)
def compatibility(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Flags set before or after the weights are processed."""
    bare = without_edits(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    early = bool(case.run.token_seed % 2)
    if early:
        turn(subject, case.run.flags, True)
    process(subject, case)
    if not early:
        turn(subject, case.run.flags, True)
    truth, plain = reference(case.model), sites_of(subject, case)
    for name, its in (("log-probabilities", bare), ("log-probabilities, edited", case)):
        forks = Forks(its, truth, None, exact=False, everywhere=False)
        expected = observe(truth, bare, sites=plain, backward=False, recorder=forks)
        edit_behind_flags(subject, its)
        actual = observe(subject, bare, sites={}, backward=False)
        due = log_probabilities_of(expected.logits, case)
        got = log_probabilities_of(actual.logits, case)
        yield from probability_gaps(name, due, got, truth, bare)
