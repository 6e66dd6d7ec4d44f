"""Longer inputs, further positions, more and wider heads than other checks draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.forked import without_edits
from conformance.checks.interventions import BEARABLE, block_edits
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, everywhere_gaps, has_exact, in_one_forward
from conformance.compare import Gap, compare_values
from conformance.observe import observe, sites_of
from conformance.spec import POSITIONS, Case, ModelSpec, RunSpec
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import bridged, patched, reference

ROOMS = st.sampled_from((48, 4096, 4096))
# Half of them beyond windows of 128. The trained model has room for 96.
_LENGTHS = (25, 39, 64, 80, 95, 96, 129, 150, 180, 200, 257)
BATCHES = st.integers(1, 2)
# Heads, key-value heads and sizes of a head, up to those of published models; None changes nothing.
SIZES = st.sampled_from(
    (*(None,) * 5, (2, 1, 64), (8, 2, 32), (16, 4, 16), (32, 8, 4), (1, 1, 128), (8, 8, 32))
)


def _sized(model: ModelSpec, size: tuple[int, int, int] | None) -> ModelSpec:
    """The model with heads of that size, whose projections and clip are as large as they were."""
    if size is None:
        return model
    n_heads, n_kv, d_head = size
    hidden = n_heads * d_head if model.head_dim is None else model.hidden_size
    return replace(
        model,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        head_dim=model.head_dim and d_head,
        hidden_size=hidden,
        weight_scale=model.weight_scale * sqrt(model.hidden_size / hidden),
    )


def _runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """Long runs. Beyond 1024 of few heads alone: a pattern has an entry for each pair of tokens."""
    few = model.num_attention_heads <= 2
    return run_specs(
        model,
        lengths=st.sampled_from((*_LENGTHS, 1030) if few else _LENGTHS),
        batches=BATCHES,
        positions=st.sampled_from(POSITIONS),
        edits=block_edits(range(model.num_hidden_layers), (*BEARABLE, *("in_place",) * 4)),
    )


def long_cases() -> SearchStrategy[Case]:
    """Cases of more tokens than a window, a block of queries or a small table would hold."""
    drawn = model_specs(rooms=ROOMS, layers=st.integers(1, 2))
    return cases(models=st.builds(_sized, drawn, SIZES), runs=_runs)


@check(
    "forward.long",
    "On dozens and hundreds of tokens, at positions beyond max_position_embeddings, with as many "
    "and as wide heads as published models have, every value and every gradient of the bridged and "
    "of the exactly patched model is the reference's, with edits everywhere in a block too.",
    long_cases,
    examples=0.3,
)
def long(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Models with room for the input, or for an eighth of what it was drawn for. A third is bare.

    Edits in place are made without a gradient: PyTorch refuses most of them under one.
    """
    case, draw = in_one_forward(case), drawing(case)
    room = case.model.max_position_embeddings // (1, 8)[draw(2)]
    model = replace(case.model, max_position_embeddings=room)
    subject = bridged(model, adapter, prepared=case.run.prepared)
    bare = without_edits(case)
    if draw(3) == 0:
        case = bare
    if any(edit.kind == "in_place" for edit in case.run.edits):
        every = sites_of(subject, case)
        expected = observe(reference(model), case, sites=every, backward=False)
        actual = observe(subject, case, sites=every, backward=False)
        yield from compare_values(expected, actual, every)
    else:
        yield from everywhere_gaps(reference(model), subject, case)
    if has_exact(adapter):
        subject = patched(model, adapter, exact_clip=True)
        for gap in everywhere_gaps(reference(model), subject, bare):
            yield replace(gap, site=f"patched: {gap.site}")
