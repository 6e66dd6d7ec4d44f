"""Hypothesis strategies for models, runs, cases and edits, aimed at where faults hide.

Most faults of a bridge are invisible on a plain multi-head float32 model without padding. So the
defaults draw every odd setting on purpose, and each independently of the others: a clip that binds
meets grouped heads, some of the biases and every dtype. A valid value is built, none is filtered
out, so a narrower strategy costs no more than the default one::

    cases(models=model_specs(dtypes=st.just("float32"), clips=clip_binding()))
    cases(runs=partial(run_specs, paddings=st.just("left"), trainings=st.just(True)))
    cases(runs=lambda model: run_specs(
        model, edits=st.tuples(edits(sites=st.sampled_from(list(observable(model)))))))

Everything shrinks towards the smallest plain OLMo: one layer, one head, one row of one token,
float32, no clip, no bias, no padding, seed 0. The simplest stands first in each `sampled_from`;
what stands there more than once is drawn more often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import sqrt
from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from conformance.data import held_out_tokens, trained
from conformance.profiles import chosen_dtypes
from conformance.spec import (
    EDITS,
    EXCLUSIVE,
    FLAGS,
    PADDINGS,
    POSITIONS,
    PROJECTIONS,
    ROPE_TYPES,
    Case,
    Edit,
    ModelSpec,
    Rerun,
    RunSpec,
    blinds,
)

MAX_WIDTH = 24  # of all heads together

Value = TypeVar("Value")


def _mostly(first: Value, *others: Value) -> SearchStrategy[Value]:
    """The first value half of the time, the others evenly. Shrinks towards the first."""
    return st.sampled_from((first,) * len(others) + others)


# Heads and key-value heads. Every way of grouping has its own fault: a repeat left out or in the
# wrong order (1 < n_kv < n_heads), groups of odd size, an odd number of them, a single one.
_GROUPED = ((4, 2), (6, 3), (6, 2))

# Clips in units of the projections' standard deviation. A normal entry exceeds the binding ones
# with a chance of 32%, 62%, 13% and 84%; (nearly) every entry exceeds the total ones.
_BINDING = (1.0, 0.5, 1.5, 0.2)
_TOTAL = (1e-3, 0.0)
_FAR = 100.0

_SOME_BIASES = tuple(some for size in (1, 2, 3) for some in combinations(PROJECTIONS, size))

# Hypothesis takes two choices among equal elements for choices of the same thing, and spends five
# draws of six on copying one over the other: near copies of one case. So no two of the defaults
# below have equal elements. Nor is any a `one_of`, which shrinks to whatever makes fewer choices.

# The dtypes in which a sum may be taken in another order at little loss.
WIDE_DTYPES = st.sampled_from(("float32", "float64"))

# The defaults of `model_specs`.
HEAD_PAIRS = ((1, 1), (2, 2), (2, 1), (3, 3), (3, 1), *_GROUPED, (4, 1), (8, 2))
HEADS = st.sampled_from(HEAD_PAIRS)
HEAD_DIMS = st.sampled_from((2, 4, 6, 8))
# ``divided`` leaves head_dim to Hugging Face: n_heads * head_dim == hidden_size, so a square W_O,
# whose transposition no shape shows. ``stated`` is the same with its head_dim written down, and
# ``free`` draws a hidden_size that has nothing to do with the heads.
GEOMETRIES = _mostly("divided", "free", "stated")
HIDDEN_SIZES = st.sampled_from(range(2, 25))  # not 1: a LayerNorm leaves nothing of one entry
INTERMEDIATE_SIZES = st.sampled_from(range(2, 24))
LAYERS = st.sampled_from((1, 1, 1, 2, 2, 2, 3))
VOCABULARIES = st.sampled_from(range(3, 30))  # in a small one the pad token is a frequent word
ROOMS = st.sampled_from(range(4, 25))
ACTIVATIONS = _mostly("silu", "gelu", "relu", "gelu_pytorch_tanh")
ROPES = _mostly(*ROPE_TYPES)
THETAS = _mostly(10_000.0, 100.5, 500_000.0)
TIES = st.sampled_from((False, False, True))
# Without one, what a mask hides is token 0.
PAD_TOKENS: SearchStrategy[int | None] = _mostly(1, 0, None)
DROPOUTS = _mostly(0.0, 0.1, 0.5)
CLIPS: SearchStrategy[float | None] = st.sampled_from((None, None, *_BINDING, *_TOTAL, _FAR))
BIASES = st.sampled_from(((),) * 14 + _SOME_BIASES + (PROJECTIONS,) * 14)
SCALES = _mostly(0.3, 0.2, 0.45)
WEIGHT_SEEDS = st.sampled_from(range(2**20))

# The defaults of `run_specs`. Of the lengths, the last is cut to the room that the model has.
LENGTHS = st.sampled_from((1, *range(1, 10), 24, 24, 24))
BATCHES = st.sampled_from(range(1, 5))  # the padding ``rows`` needs four to get to its gap
PADDING_KINDS = _mostly(*PADDINGS)
POSITION_KINDS = _mostly(*POSITIONS)
CACHES = st.sampled_from((False, True))
CHUNKS = st.sampled_from(range(1, 4))
TRAININGS = st.sampled_from((False, False, True, True))
PREPARATIONS = st.sampled_from((True, False))
TOKEN_SEEDS = st.sampled_from(range(2**18))

# Whatever is drawn, one case in twenty is a freshly built one: building is under test as well. Some
# series are shorter, and Hypothesis draws these more often than they stand here.
MOST_RERUNS = 19
FEWEST_RERUNS = st.sampled_from((0, *(MOST_RERUNS,) * 39))

EDIT_KINDS = st.sampled_from(EDITS)
EDIT_SEEDS = st.sampled_from(range(2**16))
NO_EDITS: SearchStrategy[tuple[Edit, ...]] = st.just(())
NO_FLAGS: SearchStrategy[tuple[str, ...]] = st.just(())


def grouped_heads() -> SearchStrategy[tuple[int, int]]:
    """Heads and key-value heads with ``1 < n_kv < n_heads``. Shrinks towards fewer of them."""
    return st.sampled_from(_GROUPED)


def clip_binding() -> SearchStrategy[float | None]:
    """Clips that bind on some entries and not on others. Shrinks towards one deviation."""
    return st.sampled_from(_BINDING)


def clip_total() -> SearchStrategy[float | None]:
    """Clips that bind on every entry: tiny ones, and 0.0, which Hugging Face takes for a clamp."""
    return st.sampled_from(_TOTAL)


def clip_inactive() -> SearchStrategy[float | None]:
    """A clip that no entry reaches, so that it must change nothing."""
    return st.just(_FAR)


def clip_present() -> SearchStrategy[float | None]:
    """Clips of every kind, but always one. Shrinks towards one that binds."""
    return st.sampled_from((*_BINDING, *_TOTAL, _FAR))


def legal_flags() -> SearchStrategy[tuple[str, ...]]:
    """Flags of a bridge, in every legal combination but none. Shrinks towards one."""
    sets = (some for size in range(1, 1 + len(FLAGS)) for some in combinations(FLAGS, size))
    return st.sampled_from([some for some in sets if not set(some) >= EXCLUSIVE])


@st.composite
def model_specs(
    draw: DrawFn,
    *,
    heads: SearchStrategy[tuple[int, int]] = HEADS,
    head_dims: SearchStrategy[int] = HEAD_DIMS,
    geometries: SearchStrategy[str] = GEOMETRIES,
    layers: SearchStrategy[int] = LAYERS,
    rooms: SearchStrategy[int] = ROOMS,
    activations: SearchStrategy[str] = ACTIVATIONS,
    rope_types: SearchStrategy[str] = ROPES,
    ties: SearchStrategy[bool] = TIES,
    pad_tokens: SearchStrategy[int | None] = PAD_TOKENS,
    dropouts: SearchStrategy[float] = DROPOUTS,
    clips: SearchStrategy[float | None] = CLIPS,
    biases: SearchStrategy[tuple[str, ...]] = BIASES,
    dtypes: SearchStrategy[str] | None = None,
) -> ModelSpec:
    """Tiny models. Shrinks towards one layer, one head of two entries and a plain float32 OLMo.

    Args:
        draw: Given by Hypothesis.
        heads: Pairs of a number of heads and a divisor of it, the number of key-value heads.
        head_dims: Even sizes of a head, cut so that all heads fit into `MAX_WIDTH`.
        geometries: ``divided``, ``stated`` or ``free``: how hidden_size and heads are related.
        layers: Numbers of blocks.
        rooms: Values of max_position_embeddings.
        activations: Names of the MLP's activation.
        rope_types: Of `ROPE_TYPES`.
        ties: Whether the unembedding is the embedding.
        pad_tokens: The tokens whose rows of the embedding are not trained, or None.
        dropouts: Of the attention; nothing comes of them outside train mode.
        clips: Clips in units of the projections' standard deviation, or None for no clamp.
        biases: Which of the projections have one.
        dtypes: Of `DTYPES`; None draws from those chosen for this run.
    """
    n_heads, n_kv = draw(heads)
    d_head = min(draw(head_dims), MAX_WIDTH // n_heads // 2 * 2)
    rope_type = draw(rope_types)
    if rope_type == "dynamic":
        d_head = max(d_head, 4)  # Hugging Face divides by d_head - 2
    geometry = draw(geometries)
    hidden = draw(HIDDEN_SIZES) if geometry == "free" else n_heads * d_head
    scale, clip = draw(SCALES), draw(clips)
    if clip is not None:
        # A projection sees a LayerNorm's output: entries of size one. Rounded to be readable.
        clip = float(f"{clip * scale * sqrt(hidden):.3g}")
    return ModelSpec(
        hidden_size=hidden,
        intermediate_size=draw(INTERMEDIATE_SIZES),
        num_hidden_layers=draw(layers),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        head_dim=None if geometry == "divided" else d_head,
        vocab_size=draw(VOCABULARIES),
        max_position_embeddings=draw(rooms),
        hidden_act=draw(activations),
        rope_type=rope_type,
        rope_theta=draw(THETAS),
        tie_word_embeddings=draw(ties),
        pad_token_id=draw(pad_tokens),
        attention_dropout=draw(dropouts),
        clip_qkv=clip,
        biases=draw(biases),
        dtype=draw(st.sampled_from(chosen_dtypes()) if dtypes is None else dtypes),
        weight_seed=draw(WEIGHT_SEEDS),
        weight_scale=scale,
    )


@st.composite
def edits(
    draw: DrawFn,
    *,
    sites: SearchStrategy[str],
    kinds: SearchStrategy[str] = EDIT_KINDS,
) -> Edit:
    """An intervention at one of the given sites. Shrinks towards the first, left as it is."""
    return Edit(site=draw(sites), kind=draw(kinds), seed=draw(EDIT_SEEDS))


@st.composite
def run_specs(
    draw: DrawFn,
    model: ModelSpec,
    *,
    batches: SearchStrategy[int] = BATCHES,
    lengths: SearchStrategy[int] = LENGTHS,
    paddings: SearchStrategy[str] = PADDING_KINDS,
    positions: SearchStrategy[str] = POSITION_KINDS,
    caches: SearchStrategy[bool] = CACHES,
    chunks: SearchStrategy[int] = CHUNKS,
    trainings: SearchStrategy[bool] = TRAININGS,
    preparations: SearchStrategy[bool] = PREPARATIONS,
    edits: SearchStrategy[tuple[Edit, ...]] = NO_EDITS,
    flags: SearchStrategy[tuple[str, ...]] = NO_FLAGS,
) -> RunSpec:
    """Runs of a model. Shrinks towards one row of one token, no padding, no cache, eval mode.

    Args:
        draw: Given by Hypothesis.
        model: What is to be run.
        batches: Numbers of rows.
        lengths: Numbers of tokens in a row, cut to the positions that the model has.
        paddings: Of `PADDINGS`; where a float64 model cannot bear one it is ``right`` instead.
        positions: Of `POSITIONS`.
        caches: Whether there is a key-value cache.
        chunks: Numbers of forwards over a cache, cut to the number of tokens; 1 without a cache.
        trainings: Whether the run is in train mode, which shows only through a model's dropout.
        preparations: Whether ``prepare_model`` runs before the model is bridged.
        edits: The interventions, all of them.
        flags: The bridge's flags, all of them.
    """
    length = min(draw(lengths), model.max_position_embeddings)
    padding = draw(paddings)
    # A row that begins with a pad has a query that sees no key. Hugging Face's own float64 model
    # makes NaN of it: the mask's finfo(float64).min is -inf in its float32 softmax.
    if blinds(padding, length) and model.dtype == "float64":
        padding = "right"
    cached = draw(caches)
    return RunSpec(
        token_seed=draw(TOKEN_SEEDS),
        batch=draw(batches),
        seq_len=length,
        padding=padding,
        positions=draw(positions),
        use_cache=cached,
        chunks=min(draw(chunks), length) if cached else 1,
        training=draw(trainings),
        prepared=draw(preparations),
        edits=draw(edits),
        flags=draw(flags),
    )


@st.composite
def cases(
    draw: DrawFn,
    *,
    models: SearchStrategy[ModelSpec] | None = None,
    runs: Callable[[ModelSpec], SearchStrategy[RunSpec]] = run_specs,
) -> Case:
    """A model and a run of it. Shrinks towards the smallest of both.

    Args:
        draw: Given by Hypothesis.
        models: The models; None draws from all of `model_specs`.
        runs: Given a model, the runs of it: `run_specs` or a narrower form of it.
    """
    model = draw(models if models is not None else model_specs())
    return Case(model=model, run=draw(runs(model)))


@st.composite
def series(draw: DrawFn, *, fewest: SearchStrategy[int] = FEWEST_RERUNS) -> Case:
    """A model and many runs of it, each with weights of its own. Shrinks towards a single run.

    Args:
        draw: Given by Hypothesis.
        fewest: Numbers of runs after the first, at the least; `MOST_RERUNS` at the most.
    """
    case = draw(cases())
    # Of the model's fields, only the seed of the weights may differ: the rest is built in.
    again = st.builds(Rerun, weight_seed=WEIGHT_SEEDS, run=run_specs(case.model))
    reruns = draw(st.lists(again, min_size=draw(fewest), max_size=MOST_RERUNS))
    # Train and eval mode change once: walking through all modules costs a forward.
    reruns.sort(key=lambda rerun: rerun.run.training != case.run.training)
    return replace(case, reruns=tuple(reruns))


def clipped_cases() -> SearchStrategy[Case]:
    """Cases whose model always has a clip, of any kind."""
    return cases(models=model_specs(clips=clip_present()))


def _block(edit: Edit) -> int:
    """The block that an edit is in, or -1."""
    blocks, _, rest = edit.site.partition(".")
    return int(rest.partition(".")[0]) if blocks == "blocks" else -1


def on_trained(case: Case) -> Case:
    """The same run of the trained model, on real text.

    It has as many layers as nearly any drawn model, and grouped heads and a clip, but no biases. Of
    the drawn model the dtype and the dropout stay; of a run, what the trained model has room for.
    """
    text, run = held_out_tokens(), case.run
    model = replace(trained(case.model.dtype), attention_dropout=case.model.attention_dropout)
    length = min(run.seq_len, model.max_position_embeddings)
    there = (edit for edit in run.edits if _block(edit) < model.num_hidden_layers)
    run = replace(run, seq_len=length, chunks=min(run.chunks, length), edits=tuple(there))
    room = len(text) - run.seq_len
    starts = ((run.token_seed + row * run.seq_len) % room for row in range(run.batch))
    tokens = tuple(text[start : start + run.seq_len] for start in starts)
    return Case(model=model, run=run, tokens=tokens)
