"""Hypothesis strategies for steps, and for cases that are sequences of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

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
    *("forward", "run_with_hooks", "hooks_context", "failing_backward_hook"),
    *("failing_hook", "add_backward_hook", "run_with_cache") * 2,
    *("backward",) * 3,
    *("optimize", "zero_grad", "output_attentions", "generate", "generate"),
    *("add_hook",) * 3,
    *("add_permanent_hook", "reset_hooks") * 2,
    *("remove_hooks", "reset_all_hooks"),
    *("flag",) * 3,
    *("train", "eval") * 2,
    *("cast", "cast", "load", "load", "freeze", "freeze", "thaw"),
    *("deepcopy", "deepcopy", "pickle", "pickle", "prepare", "unpatch"),
    *("compatibility",) * 4,
)
# Post-clip hooks, which only some adapters have, are left to the checks that are about them.
ROWS = tuple(site.name for site in TABLE if site.status in (Status.REQUIRED, Status.FLAGGED))
MOST_STEPS = 40
_PROCESSING = tuple(
    some for size in range(len(PROCESSING) + 1) for some in combinations(PROCESSING, size)
)


@dataclass(frozen=True)
class _Swarm:
    """What the steps of one sequence are drawn from: some of all, so that they meet more often."""

    kinds: tuple[str, ...]
    flags: tuple[str, ...]
    rows: tuple[str, ...]


def _swarm(seed: int) -> _Swarm:
    """Two thirds of the kinds, two flags and four rows; of seed 0, everything."""
    if not seed:
        return _Swarm(KINDS, FLAGS, ROWS)
    chance = Random(seed)
    every = list(dict.fromkeys(KINDS))
    most = chance.sample(every, len(every) * 2 // 3)
    kinds = tuple(kind for kind in KINDS if kind in most)
    return _Swarm(kinds, tuple(chance.sample(FLAGS, 2)), tuple(chance.sample(ROWS, 4)))


def _step(draw: DrawFn, model: ModelSpec, swarm: _Swarm, place: int) -> Step:
    """Draw a step, legal or not: what the state forbids is left out when it is taken.

    No two places in a sequence draw from equal elements, and no strategy stands for a whole step,
    or Hypothesis would draw near-copies of few sequences (see `conformance.strategies`).
    """

    def one_of(elements: Sequence[str]) -> str:
        return draw(st.sampled_from(tuple(elements) * (1 + place)))

    kind = one_of(swarm.kinds)
    named: dict[str, str] = {}
    if kind in SITED_STEPS:
        blocks = [str(block) for block in range(model.num_hidden_layers)]
        named["site"] = one_of(swarm.rows).replace("{i}", one_of(blocks))
        named["edit"] = one_of(EDITS)
    if kind == "flag":
        named["flag"] = one_of(swarm.flags)
    if kind == "cast":
        named["dtype"] = one_of(DTYPES)
    seed = draw(st.sampled_from(range(2**10 + place)))
    return Step(kind=kind, **named, seed=seed)


@st.composite
def _sequences(draw: DrawFn, model: ModelSpec) -> tuple[Step, ...]:
    # A fault needs a pair of steps, and pairs grow with the square of the length.
    count = draw(st.sampled_from((*range(1, MOST_STEPS), *[MOST_STEPS] * MOST_STEPS)))
    swarm = _swarm(draw(st.sampled_from(range(2**14))))
    return tuple(_step(draw, model, swarm, place) for place in range(count))


def models() -> SearchStrategy[ModelSpec]:
    """Models of one block or two: a step costs some forwards."""
    return model_specs(layers=st.sampled_from((1, 1, 1, 2)))


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
