"""The default strategies reach every place where faults hide, and shrink to the smallest case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from random import Random

import pytest
import torch
from hypothesis import Phase, find, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.inputs import inputs
from conformance.observe import observe
from conformance.records import Record, loads
from conformance.sites import observable
from conformance.spec import (
    DTYPES,
    EDITS,
    PADDINGS,
    POSITIONS,
    PROJECTIONS,
    ROPE_TYPES,
    Case,
    Edit,
    ModelSpec,
    RunSpec,
)
from conformance.strategies import (
    cases,
    clip_binding,
    clip_inactive,
    clip_present,
    clip_total,
    clipped_cases,
    edits,
    grouped_heads,
    model_specs,
    run_specs,
)
from conformance.subjects import reference

torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other

DRAWS = 200
ENOUGH = 3

# The defaults, whatever dtypes this run of pytest was told to judge.
EVERYTHING = cases(models=model_specs(dtypes=st.sampled_from(DTYPES)))


def sample(strategy: SearchStrategy[Case], draws: int = DRAWS) -> list[Case]:
    drawn: list[Case] = []

    @seed(0)
    @settings(max_examples=draws, database=None, deadline=None, phases=[Phase.generate])
    @given(strategy)
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


@cache
def drawn() -> tuple[Case, ...]:
    return tuple(sample(EVERYTHING))


@cache
def projections(case: Case) -> torch.Tensor:
    """Every entry of q, k and v before the clamp, in one row."""
    seen = observe(reference(case.model), case, sites=observable(case.model), backward=False).values
    ends = tuple(f"attn.{letter}.hook_out" for letter in "qkv")
    return torch.cat([x.flatten() for name, x in seen.items() if name.split("#")[0].endswith(ends)])


def bound(case: Case) -> float:
    """The share of the entries of q, k and v that the clip changes."""
    assert case.model.clip_qkv is not None
    return float((projections(case).abs() > case.model.clip_qkv).double().mean())


def clips(case: Case, low: float, high: float) -> bool:
    return case.model.clip_qkv is not None and low <= bound(case) <= high


def binds(case: Case) -> bool:
    return clips(case, 0.05, 0.95)


def grouped(case: Case) -> bool:
    return 1 < case.model.num_key_value_heads < case.model.num_attention_heads


def square(case: Case) -> bool:
    return case.model.num_attention_heads * case.model.d_head == case.model.hidden_size


def some_biases(case: Case) -> bool:
    return 0 < len(case.model.biases) < len(PROJECTIONS)


def drops(case: Case) -> bool:
    return case.run.training and case.model.attention_dropout > 0


def pads_in_text(case: Case) -> bool:
    """Whether a token that is attended to, and not the first, is the pad token."""
    data = inputs(case)
    mask = torch.ones_like(data.tokens) if data.attention_mask is None else data.attention_mask
    return bool(((data.tokens == case.model.pad_token_id) & (mask == 1))[:, 1:].any())


def masks(case: Case, kind: str) -> bool:
    """Whether padding of a kind really hides a token."""
    mask = inputs(case).attention_mask
    return case.run.padding == kind and mask is not None and bool((mask == 0).any())


REGIMES: dict[str, Callable[[Case], bool]] = {
    "grouped": grouped,
    "grouped, odd groups": lambda c: grouped(c) and c.model.num_key_value_heads % 2 == 1,
    "grouped, groups of odd size": lambda c: (
        grouped(c) and c.model.num_attention_heads // c.model.num_key_value_heads % 2 == 1
    ),
    "multi-query": lambda c: c.model.num_attention_heads > c.model.num_key_value_heads == 1,
    "multi-head": lambda c: c.model.num_attention_heads == c.model.num_key_value_heads > 1,
    "one head": lambda c: c.model.num_attention_heads == 1,
    "head_dim overridden": lambda c: not square(c),
    "head_dim overridden, more than hidden_size": lambda c: (
        c.model.num_attention_heads * c.model.d_head > c.model.hidden_size
    ),
    "head_dim overridden, hidden_size not divisible": lambda c: (
        c.model.hidden_size % c.model.num_attention_heads != 0
    ),
    "square W_O": square,
    "square W_O, head_dim stated": lambda c: square(c) and c.model.head_dim is not None,
    "no clip": lambda c: c.model.clip_qkv is None,
    "clip inactive": lambda c: clips(c, 0, 0),
    "clip partly binding": lambda c: clips(c, 0.05, 0.5),
    "clip mostly binding": lambda c: clips(c, 0.5, 0.95),
    "clip tiny": lambda c: c.model.clip_qkv is not None and 0 < c.model.clip_qkv < 0.01,
    "clip 0.0": lambda c: c.model.clip_qkv == 0.0,
    "no bias": lambda c: not c.model.biases,
    "some biases": some_biases,
    "all biases": lambda c: c.model.biases == PROJECTIONS,
    "tied": lambda c: c.model.tie_word_embeddings,
    "untied": lambda c: not c.model.tie_word_embeddings,
    "pad tokens in the text": pads_in_text,
    "the first token pads": lambda c: c.model.pad_token_id == 0,
    "no pad token": lambda c: c.model.pad_token_id is None,
    "groups of four": lambda c: c.model.num_attention_heads == 4 * c.model.num_key_value_heads,
    "length 1": lambda c: c.run.seq_len == 1,
    "length max_position_embeddings": lambda c: c.run.seq_len == c.model.max_position_embeddings,
    "train with dropout": drops,
    "dropout in eval mode": lambda c: c.model.attention_dropout > 0 and not c.run.training,
    "several layers": lambda c: c.model.num_hidden_layers > 1,
    "cache, one forward": lambda c: c.run.use_cache and c.run.chunks == 1,
    "cache, chunks": lambda c: c.run.chunks > 1,
    "prepared": lambda c: c.run.prepared,
    "not prepared": lambda c: not c.run.prepared,
    "silu": lambda c: c.model.hidden_act == "silu",
    "another activation": lambda c: c.model.hidden_act != "silu",
    **{f"dtype {x}": partial(lambda c, x: c.model.dtype == x, x=x) for x in DTYPES},
    **{f"rope {x}": partial(lambda c, x: c.model.rope_type == x, x=x) for x in ROPE_TYPES},
    **{f"padding {x}": partial(lambda c, x: masks(c, x), x=x) for x in PADDINGS[1:]},
    "padding none": lambda c: c.run.padding == "none",
    **{f"positions {x}": partial(lambda c, x: c.run.positions == x, x=x) for x in POSITIONS},
    # What makes a fault visible is often two settings at once.
    **{
        f"clip binds in {x}": partial(lambda c, x: binds(c) and c.model.dtype == x, x=x)
        for x in DTYPES
    },
    **{
        f"grouped in {x}": partial(lambda c, x: grouped(c) and c.model.dtype == x, x=x)
        for x in DTYPES
    },
    "clip binds, grouped": lambda c: binds(c) and grouped(c),
    "clip binds, some biases": lambda c: binds(c) and some_biases(c),
    "clip binds, grouped, biases": lambda c: binds(c) and grouped(c) and bool(c.model.biases),
    "clip binds, train with dropout": lambda c: binds(c) and drops(c),
    "clip binds, chunks": lambda c: binds(c) and c.run.chunks > 1,
    "clip binds, not prepared": lambda c: binds(c) and not c.run.prepared,
    "grouped, head_dim overridden": lambda c: grouped(c) and not square(c),
    "padding, chunks": lambda c: c.run.padding != "none" and c.run.chunks > 1,
    "moved positions, chunks": lambda c: c.run.positions != "derived" and c.run.chunks > 1,
}  # fmt: skip


@pytest.mark.parametrize("regime", REGIMES)
def test_draws_meet_every_regime(regime: str) -> None:
    assert len(drawn()) == DRAWS
    met = sum(REGIMES[regime](case) for case in drawn())
    assert met >= ENOUGH, f"{regime}: {met} of {DRAWS} draws"


def test_clip_binds_on_a_part_in_a_fifth_of_the_clip_models() -> None:
    clipped = [case for case in drawn() if case.model.clip_qkv is not None]
    binding = [case for case in clipped if binds(case)]
    assert len(binding) / len(clipped) >= 0.2, f"{len(binding)} of {len(clipped)}"


def test_every_draw_builds_and_is_finite() -> None:
    """Hugging Face's own NaN or overflow would excuse any fault of a bridge."""
    for case in drawn()[::4]:
        seen = observe(reference(case.model), case)
        assert seen.logits.isfinite().all(), case
        for name, gradient in seen.parameter_gradients.items():
            assert gradient is None or gradient.isfinite().all(), (name, case)


@seed(0)
@settings(max_examples=100, database=None, deadline=None)
@given(
    cases(
        runs=lambda model: run_specs(
            model, edits=st.lists(edits(sites=st.sampled_from(list(observable(model))))).map(tuple)
        )
    )
)
def test_every_draw_round_trips(case: Case) -> None:
    record = Record(case=case, check="forward.logits", adapter="adapter:OlmoArchitectureAdapter")
    assert loads(record.dumps()) == record


def test_draws_are_no_copies_of_each_other() -> None:
    """Hypothesis copies one choice over another that looks like it, if it can."""
    assert len({(case.model.weight_seed, case.run.token_seed) for case in drawn()}) > 0.9 * DRAWS
    assert len({case.model.weight_seed for case in drawn()}) > 0.8 * DRAWS


def test_sampling_is_deterministic() -> None:
    assert sample(EVERYTHING) == list(drawn())


class TestNarrowed:
    """A caller's strategy is what is drawn."""

    @pytest.mark.parametrize(
        ("strategy", "low", "high"),
        [(clip_inactive(), 0, 0), (clip_total(), 0.9, 1), (clip_binding(), 0.05, 0.95)],
        ids=["inactive", "total", "binding"],
    )
    def test_clips(self, strategy: SearchStrategy[float | None], low: float, high: float) -> None:
        shares = [bound(case) for case in sample(cases(models=model_specs(clips=strategy)), 30)]
        inside = sum(low <= share <= high for share in shares)
        # A case of one token and one head has few entries, so a binding clip can miss them all.
        assert inside >= (20 if high == 0.95 else 30), sorted(shares)

    def test_clipped_cases(self) -> None:
        assert all(case.model.clip_qkv is not None for case in sample(clipped_cases(), 50))
        narrowed = sample(cases(models=model_specs(clips=clip_present())), 50)
        assert all(case.model.clip_qkv is not None for case in narrowed)

    def test_grouped_heads(self) -> None:
        assert all(map(grouped, sample(cases(models=model_specs(heads=grouped_heads())), 50)))

    def test_model(self) -> None:
        models = model_specs(dtypes=st.just("float32"), biases=st.just(("q",)), layers=st.just(2))
        for case in sample(cases(models=models), 20):
            got = case.model.dtype, case.model.biases, case.model.num_hidden_layers
            assert got == ("float32", ("q",), 2)

    def test_run(self) -> None:
        runs = partial(run_specs, paddings=st.just("gap"), trainings=st.just(True))
        models = model_specs(dtypes=st.just("float32"))
        for case in sample(cases(models=models, runs=runs), 20):
            assert (case.run.padding, case.run.training) == ("gap", True)

    def test_float64_never_blinds_a_query(self) -> None:
        """Hugging Face gives NaN there: see `run_specs`."""
        models = model_specs(dtypes=st.just("float64"))
        for kind in PADDINGS:
            runs = partial(run_specs, paddings=st.just(kind), lengths=st.integers(1, 4))
            for case in sample(cases(models=models, runs=runs), 20):
                mask = inputs(case).attention_mask
                assert mask is None or bool((mask[:, 0] == 1).all())

    def test_length_is_cut_to_the_model(self) -> None:
        models = model_specs(rooms=st.just(5))
        lengths = {case.run.seq_len for case in sample(cases(models=models), 50)}
        assert max(lengths) == 5


SMALLEST = Case(
    model=ModelSpec(
        hidden_size=2,
        intermediate_size=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=3,
        max_position_embeddings=4,
    ),
    run=RunSpec(seq_len=1),
)

# What a fault may need, and the only changes to the smallest case that it should leave.
FAULTS: dict[str, tuple[Callable[[Case], bool], dict[str, object], dict[str, object]]] = {
    "any": (lambda c: True, {}, {}),
    "clip": (lambda c: c.model.clip_qkv is not None, {"clip_qkv": 0.424}, {}),
    "clip 0.0": (lambda c: c.model.clip_qkv == 0, {"clip_qkv": 0.0}, {}),
    "bias": (lambda c: bool(c.model.biases), {"biases": ("q",)}, {}),
    "all biases": (lambda c: c.model.biases == PROJECTIONS, {"biases": PROJECTIONS}, {}),
    "second layer": (lambda c: c.model.num_hidden_layers > 1, {"num_hidden_layers": 2}, {}),
    "grouped": (
        grouped,
        {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
        {},
    ),
    "multi-query": (
        lambda c: c.model.num_attention_heads > c.model.num_key_value_heads,
        {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
        {},
    ),
    "head_dim overridden": (lambda c: not square(c), {"hidden_size": 3, "head_dim": 2}, {}),
    "bfloat16": (lambda c: c.model.dtype == "bfloat16", {"dtype": "bfloat16"}, {}),
    "yarn": (lambda c: c.model.rope_type == "yarn", {"rope_type": "yarn"}, {}),
    "relu": (lambda c: c.model.hidden_act == "relu", {"hidden_act": "relu"}, {}),
    "tied": (lambda c: c.model.tie_word_embeddings, {"tie_word_embeddings": True}, {}),
    "two tokens": (lambda c: c.run.seq_len > 1, {}, {"seq_len": 2}),
    "chunks": (
        lambda c: c.run.chunks > 1,
        {},
        {"seq_len": 2, "use_cache": True, "chunks": 2},
    ),
    "gap": (lambda c: masks(c, "gap"), {}, {"seq_len": 2, "padding": "gap"}),
    "dropout": (drops, {"attention_dropout": 0.1}, {"training": True}),
    "not prepared": (lambda c: not c.run.prepared, {}, {"prepared": False}),
    "clip and groups in float16": (
        lambda c: c.model.clip_qkv is not None and grouped(c) and c.model.dtype == "float16",
        {
            "hidden_size": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "clip_qkv": 0.849,
            "dtype": "float16",
        },
        {},
    ),
}  # fmt: skip


def shrunk(strategy: SearchStrategy[Case], fault: Callable[[Case], bool]) -> Case:
    quiet = settings(max_examples=300, database=None, deadline=None)
    return find(strategy, fault, settings=quiet, random=Random(0))


@pytest.mark.parametrize("fault", FAULTS)
def test_shrinks_to_the_smallest_case(fault: str) -> None:
    shows, model, run = FAULTS[fault]
    expected = Case(
        model=dataclasses.replace(SMALLEST.model, **model),  # type: ignore[arg-type]
        run=dataclasses.replace(SMALLEST.run, **run),  # type: ignore[arg-type]
    )
    assert shrunk(EVERYTHING, shows) == expected


def test_shrinks_a_measured_fault() -> None:
    """A fault that shows in numbers and not in the spec: the clamp changes an entry."""
    expected = dataclasses.replace(SMALLEST.model, clip_qkv=0.424)
    found = shrunk(EVERYTHING, lambda case: case.model.clip_qkv is not None and bound(case) > 0)
    assert found == Case(model=expected, run=SMALLEST.run)


def test_edit_shrinks_to_the_first_site_left_alone() -> None:
    drawn_edit = find(
        edits(sites=st.sampled_from(["first", "second"])),
        lambda edit: True,
        settings=settings(database=None),
        random=Random(0),
    )
    assert drawn_edit == Edit(site="first", kind="identity")


@pytest.mark.parametrize("kind", EDITS)
def test_every_kind_of_edit_is_drawn(kind: str) -> None:
    strategy = edits(sites=st.just("blocks.0.hook_in"))
    find(
        strategy, lambda edit: edit.kind == kind, settings=settings(database=None), random=Random(0)
    )
