"""Hypothesis strategies for steps, and for cases that are sequences of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from conformance.sites import TABLE, Status
from conformance.spec import (
    DTYPES,
    EDITS,
    FLAGS,
    PROCESSING,
    SITED_STEPS,
    Case,
    ModelSpec,
    RunSpec,
    Step,
)
from conformance.strategies import cases, model_specs, run_specs

# What stands here more than once is taken more often: it leaves more behind, or meets more.
KINDS = (
    *("forward", "run_with_hooks", "hooks_context", "failing_hook", "failing_backward_hook"),
    *("backward",) * 3,
    *("optimize", "zero_grad", "run_with_cache", "output_attentions", "generate"),
    *("add_hook",) * 3,
    *("add_permanent_hook", "add_backward_hook", "remove_hooks", "reset_hooks", "reset_all_hooks"),
    *("flag",) * 3,
    *("train",) * 2,
    *("eval", "cast", "cast", "load", "load", "freeze", "thaw"),
    *("deepcopy", "deepcopy", "pickle", "compatibility", "compatibility", "prepare", "unpatch"),
)
# Post-clip hooks, which only some adapters have, are left to the checks that are about them.
ROWS = tuple(site.name for site in TABLE if site.status in (Status.REQUIRED, Status.FLAGGED))
MOST_STEPS = 12
_PROCESSING = tuple(
    some for size in range(len(PROCESSING) + 1) for some in combinations(PROCESSING, size)
)


@st.composite
def steps(
    draw: DrawFn, model: ModelSpec, *, kinds: tuple[str, ...] = KINDS, place: int = 0
) -> Step:
    """A step, legal or not: what the state forbids is left out when it is taken.

    Args:
        draw: Given by Hypothesis.
        model: What the bridge is of.
        kinds: Kinds of steps.
        place: Its place in a sequence. No two places have equal elements, or Hypothesis would take
            them for choices of the same thing and draw near-copies (see `conformance.strategies`).
    """
    kind = draw(st.sampled_from(kinds + kinds[:1] * place))
    seed = draw(st.sampled_from(range(2**10 + place)))
    named: dict[str, Any] = {}
    if kind in SITED_STEPS:
        row = draw(st.sampled_from(ROWS + ROWS[:1] * place))
        block = draw(st.sampled_from(range(model.num_hidden_layers)))
        named["site"] = row.replace("{i}", str(block))
        named["edit"] = draw(st.sampled_from(EDITS + EDITS[:1] * place))
    if kind == "flag":
        named["flag"] = draw(st.sampled_from(FLAGS + FLAGS[:1] * place))
    if kind == "cast":
        named["dtype"] = draw(st.sampled_from(DTYPES + DTYPES[:1] * place))
    return Step(kind=kind, seed=seed, **named)


@st.composite
def _sequences(draw: DrawFn, model: ModelSpec) -> tuple[Step, ...]:
    count = draw(st.sampled_from(range(1, 1 + MOST_STEPS)))
    return tuple(draw(steps(model, place=place)) for place in range(count))


def models() -> SearchStrategy[ModelSpec]:
    """Models of one block or two: a step costs some forwards."""
    return model_specs(layers=st.sampled_from((1, 1, 2)))


def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """The greatest input of every step, and what compatibility mode is asked to process."""
    drawn = run_specs(
        model,
        batches=st.sampled_from(range(1, 3)),
        lengths=st.sampled_from(range(1, 6)),
        paddings=st.sampled_from(("none", "none", "left", "right", "gap")),
        positions=st.sampled_from(("derived", "derived", "offset", "shuffled")),
        trainings=st.just(False),
        chunks=st.just(1),
    )
    asked = st.sampled_from(_PROCESSING)
    return st.builds(lambda run, flags: replace(run, processing=flags), drawn, asked)


@st.composite
def starts(draw: DrawFn) -> Case:
    """Where a machine starts: a case without steps."""
    return draw(cases(models=models(), runs=runs))


@st.composite
def sequences(draw: DrawFn) -> Case:
    """Cases of up to `MOST_STEPS` steps. Shrinks towards few and simple ones."""
    case = draw(starts())
    taken = draw(_sequences(case.model))
    return replace(case, run=replace(case.run, steps=taken))
