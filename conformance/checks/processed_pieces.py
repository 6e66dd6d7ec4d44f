"""Compatibility mode: a cache's pieces are the reference's own, processed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.compatibility import processed_runs
from conformance.checks.decompositions import (
    accumulated_gaps,
    components_gaps,
    full_gaps,
    heads_gaps,
    neurons_gaps,
)
from conformance.checks.registry import Adapter, check
from conformance.checks.shares import shares_gaps
from conformance.checks.taken import taken
from conformance.compare import Gap
from conformance.spec import Case
from conformance.strategies import cases, model_specs


def processed_cases() -> SearchStrategy[Case]:
    """Float32 cases with any set of processing, of at least eight entries a position.

    Two are normalized to plus and minus 1 whatever they are, so that rounding may flip their sign.
    """
    runs = partial(processed_runs, paddings=("none", "none", "right"))
    square = st.sampled_from(("divided", "stated"))
    models = model_specs(dtypes=st.just("float32"), head_dims=st.just(8), geometries=square)
    return cases(models=models, runs=runs)


@check(
    "decompositions.processed",
    "In compatibility mode, with any set of weight processing, every decomposition of the cache is "
    "what the processing makes of Hugging Face's own pieces, and sums to its logits.",
    processed_cases,
    examples=0.35,
)
def processed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Writers without their mean, value biases folded out of the heads; in full, and drawn ways."""
    run = taken(adapter, case)
    others = (components_gaps, accumulated_gaps, heads_gaps, neurons_gaps, shares_gaps)
    yield from others[run.draw(len(others))](run)
    yield from full_gaps(run)
