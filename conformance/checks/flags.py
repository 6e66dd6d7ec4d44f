"""The flags that show what single heads read and write: they change nothing, and edits act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from conformance.checks.forked import edited_gaps, is_exact, paired, without_edits
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, freeze_some, turn
from conformance.compare import NOTHING_SPECIAL, Gap, compare_parameters, compare_tensors
from conformance.observe import observe
from conformance.recorder import Observation
from conformance.sites import behind_flags
from conformance.spec import Case, Edit, ModelSpec, RunSpec
from conformance.strategies import (
    EDIT_SEEDS,
    HEAD_PAIRS,
    cases,
    legal_flags,
    model_specs,
    run_specs,
)
from conformance.subjects import bridged, reference
from conformance.tolerance import Allowance, exactly


def flagged_cases() -> SearchStrategy[Case]:
    """Cases with flags, in every legal combination."""
    return cases(runs=lambda model: run_specs(model, flags=legal_flags()))


def _outcome_gaps(
    expected: Observation,
    actual: Observation,
    when: str,
    allowances: Mapping[str, Allowance] = NOTHING_SPECIAL,
) -> Iterator[Gap]:
    """Gaps between logits and between gradients of parameters."""
    dtype = expected.logits.dtype
    gap = compare_tensors("logits", expected.logits, actual.logits, exactly(dtype))
    for found in (*([gap] if gap else []), *compare_parameters(expected, actual, allowances)):
        yield replace(found, site=f"{found.site} {when}")


@check(
    "flags.unchanged",
    "Flags, alone and in every legal combination, set by set_use_* or on cfg, before or after a "
    "forward, change neither logits nor gradients; turned off they leave nothing behind.",
    flagged_cases,
    examples=0.4,
)
def unchanged(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """On, off and on again. Off, every bit is Hugging Face's."""
    if not is_exact(adapter):  # place by place, gradients can be compared of one chunk only
        case = replace(case, run=replace(case.run, chunks=1))
    flags, by_cfg = case.run.flags, bool(case.run.token_seed % 2)
    plain = observe(reference(case.model), case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    if case.run.token_seed % 3:
        observe(subject, case, backward=False)
    turn(subject, flags, True, by_cfg=by_cfg)
    first = observe(subject, case)
    expected, allowances = plain, NOTHING_SPECIAL
    if not is_exact(adapter):
        pair = paired(adapter, subject, case)
        expected, allowances = pair.expected, pair.parameters
    yield from _outcome_gaps(expected, first, f"under {flags}", allowances)
    turn(subject, flags, False, by_cfg=not by_cfg)
    off = observe(subject, case, sites={})
    yield from _outcome_gaps(plain, off, f"after {flags}")
    for name in sorted(behind_flags(case.model, case.run.flags).keys() & set(off.fired)):
        yield Gap(name, "extra", "fires though its flag was turned off")
    turn(subject, flags, True, by_cfg=not by_cfg)
    yield from _outcome_gaps(first, observe(subject, case), f"under {flags} once more")


@check(
    "flags.hooks",
    "Under flags every hook, theirs included, fires once and carries what Hugging Face computes "
    "there, or what its weights say that each head reads and writes; gradients likewise.",
    flagged_cases,
    examples=0.3,
)
def hooks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Copies of the residual stream before its LayerNorm, and z times each head's own weights."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    turn(subject, case.run.flags, True)
    yield from paired(adapter, subject, case).gaps()


_DEPTHS = st.sampled_from((*(1, 1, 1, 2, 2, 2, 3) * 3, 4, 4, 5))
# What one head reads is what another reads too, if there is only one.
_SEVERAL = [heads for heads in HEAD_PAIRS if heads[0] > 1]
SEVERAL_HEADS = st.sampled_from(
    [*_SEVERAL, *(heads for heads in _SEVERAL if heads[0] > heads[1]), *((4, 1), (8, 2))]
)
# Not identity, which `hooks` judges.
RETURNED = ("zero", "noise", "replace", "one_head", "one_position", "one_row", "scale")


@st.composite
def gate_edits(draw: DrawFn, model: ModelSpec, *, kinds: tuple[str, ...] = RETURNED) -> RunSpec:
    """Runs with an edit behind each of the flags that are on.

    Args:
        draw: Given by Hypothesis.
        model: What is to be run.
        kinds: Kinds of edits.
    """
    flags = draw(legal_flags())
    behind = behind_flags(model, flags)
    # Of a deep model the blocks that a shallow one has not.
    deep = model.num_hidden_layers > 3
    far_up = [name for name in behind if not deep or int(name.split(".")[1]) >= 3]
    # One draw of all kinds and one of all seeds: see the defaults in `conformance.strategies`.
    each, seed = draw(st.sampled_from(list(product(kinds, repeat=len(flags))))), draw(EDIT_SEEDS)
    made = tuple(
        Edit(
            site=draw(st.sampled_from([name for name in far_up if behind[name].flag == flag])),
            kind=kind,
            seed=seed + 9 * place,
        )
        for place, (flag, kind) in enumerate(zip(flags, each, strict=True))
    )
    small: dict[str, Any] = {"lengths": st.integers(1, 5), "batches": st.integers(1, 2)}
    shape = small if deep else {}
    return draw(run_specs(model, edits=st.just(made), flags=st.just(flags), **shape))


_LESS = ("zero", "scale", "one_position")  # of gradients: what makes none of them greater


def gate_edits_in_place(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """As `gate_edits`, each edit made where the tensor lies."""
    return gate_edits(model, kinds=("in_place",))


@check(
    "flags.edits",
    "An edit of what one head reads or writes, or of its gradient, has the effect of the same edit "
    "in a computation from scratch, on that head alone; of grouped heads, a key-value head "
    "reads the mean of its group's copies under use_attn_in.",
    lambda: cases(models=model_specs(heads=SEVERAL_HEADS, layers=_DEPTHS), runs=gate_edits),
    examples=0.6,
)
def edited(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every later value, and every gradient, is that of a reference led through the copies."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    turn(subject, case.run.flags, True)
    draw = drawing(case)
    of_gradients: tuple[Edit, ...] = ()
    if draw(3) == 0:  # what is computed without a gradient is of no use to one with it
        gated = behind_flags(case.model, case.run.flags)
        observe(subject, without_edits(case), sites=gated, backward=False)
    returned = all(edit.kind != "in_place" for edit in case.run.edits)
    if draw(3) == 0 and returned:
        of_gradients = tuple(replace(edit, kind=_LESS[draw(len(_LESS))]) for edit in case.run.edits)
        # Through an edit of the value: of others known defect returned-gradient-skips-edit.
        case = case if draw(2) and is_exact(adapter) else without_edits(case)
    if not returned:
        freeze_some(subject, draw)
    yield from edited_gaps(adapter, subject, case, of_gradients)


@check(
    "flags.in_place",
    "An edit in place of what heads or the MLP read, or of what heads write, has the effect of "
    "the same edit returned.",
    lambda: cases(runs=gate_edits_in_place),
    examples=0.2,
)
def in_place(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Without a gradient, or frozen, since PyTorch refuses some of these under one."""
    yield from edited.run(adapter, case)
