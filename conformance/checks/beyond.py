"""Longer inputs and further positions than other checks draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, everywhere_gaps, has_exact, in_one_forward
from conformance.compare import Gap
from conformance.spec import POSITIONS, Case
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import bridged, patched, reference

ROOMS = st.sampled_from((48, 4096))
LENGTHS = st.integers(25, 96)  # what the trained model has room for
BATCHES = st.integers(1, 2)


def long_cases() -> SearchStrategy[Case]:
    """Cases of more tokens than a window, a block of queries or a small table would hold."""
    return cases(
        models=model_specs(rooms=ROOMS, layers=st.integers(1, 2)),
        runs=partial(
            run_specs, lengths=LENGTHS, batches=BATCHES, positions=st.sampled_from(POSITIONS)
        ),
    )


@check(
    "forward.long",
    "On dozens of tokens, and at positions beyond max_position_embeddings, every value and every "
    "gradient of the bridged and of the exactly patched model is the reference's.",
    long_cases,
    examples=0.2,
)
def long(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Models with room for the input, or for an eighth of what it was drawn for."""
    case, draw = in_one_forward(case), drawing(case)
    room = case.model.max_position_embeddings // (1, 8)[draw(2)]
    model = replace(case.model, max_position_embeddings=room)
    subject = bridged(model, adapter, prepared=case.run.prepared)
    yield from everywhere_gaps(reference(model), subject, case)
    if has_exact(adapter):
        subject = patched(model, adapter, exact_clip=True)
        for gap in everywhere_gaps(reference(model), subject, case):
            yield replace(gap, site=f"patched: {gap.site}")
