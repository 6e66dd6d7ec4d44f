"""What is drawn, recorded and replayed: a model, a run of it, and the two together as a case.

Nothing here needs torch, so that a case file can be read, checked and shown at once. Every value
is validated when it is made: a spec that exists can be built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from conformance.fields import (
    boolean,
    finite,
    integer,
    one_of,
    positive,
    require,
    subset,
    tuple_of,
)

DTYPES = ("float32", "float64", "bfloat16", "float16")
PROJECTIONS = ("q", "k", "v", "o")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
PADDINGS = ("none", "left", "right", "gap", "rows")
POSITIONS = ("derived", "offset", "shuffled")
EDITS = (
    "identity",
    "zero",
    "scale",
    "noise",
    "replace",
    "one_head",
    "one_position",
    "one_row",
    "in_place",
)
WEIGHTS = ("drawn", "trained")
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
EXCLUSIVE = {"use_split_qkv_input", "use_attn_in"}
# What a step of the state machine does, and with which of a step's fields (see `Step`).
SITED_STEPS = (
    "add_hook",
    "add_permanent_hook",
    "add_backward_hook",
    "remove_hooks",
    "run_with_hooks",
    "hooks_context",
    "failing_hook",
    "failing_backward_hook",
)
STEPS = (
    *("forward", "backward", "zero_grad", "optimize"),
    *SITED_STEPS,
    *("reset_hooks", "reset_all_hooks", "run_with_cache", "output_attentions", "generate"),
    *("flag", "train", "eval", "cast", "load", "freeze", "thaw"),
    *("deepcopy", "pickle", "compatibility", "prepare", "unpatch"),
)
MAX_SEED = 2**31 - 1
# PyTorch refuses to clamp a tensor by what its dtype cannot hold.
GREATEST_CLIP = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.79e308}


def blinds(padding: str, length: int) -> bool:
    """Whether padding may hide the first token of a row: its query then sees no key."""
    return padding in ("left", "rows") or (padding == "gap" and length == 2)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The configuration fields of an OLMo that matter, under Hugging Face's own names.

    Attributes:
        head_dim: Size of a head; None lets Hugging Face divide ``hidden_size`` by the heads.
        pad_token_id: The token whose row of the embedding is never trained; None means no such row.
        clip_qkv: The clamp of q, k and v; None means no clamp, 0.0 is a real (total) one.
        biases: Which of the attention's projections q, k, v, o have a bias.
        weight_seed: Seed of every weight and bias.
        weight_scale: Standard deviation of the weights. Wide (0.3), or no clip ever binds.
        weights: ``drawn`` from the seed, or ``trained``: those of ``fixtures/trained``, cast to the
            spec's dtype. Its sizes and biases must then be that model's (see `data.trained`).
    """

    hidden_size: int = 16
    intermediate_size: int = 24
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    num_key_value_heads: int = 2
    head_dim: int | None = None
    vocab_size: int = 17
    max_position_embeddings: int = 32
    hidden_act: str = "silu"
    rope_type: str = "default"
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 1
    attention_dropout: float = 0.0
    clip_qkv: float | None = None
    biases: tuple[str, ...] = ()
    dtype: str = "float32"
    weight_seed: int = 0
    weight_scale: float = 0.3
    weights: str = "drawn"

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        integer(self, (*sizes, "num_key_value_heads", "max_position_embeddings"), 1)
        integer(self, ("vocab_size",), 2)
        integer(self, ("weight_seed",), 0, MAX_SEED)
        positive(self, "rope_theta", "weight_scale")
        boolean(self, "tie_word_embeddings")
        if self.pad_token_id is not None:
            integer(self, ("pad_token_id",), 0, self.vocab_size - 1)
        one_of(self, "dtype", DTYPES)
        one_of(self, "rope_type", ROPE_TYPES)
        one_of(self, "weights", WEIGHTS)
        subset(self, "biases", PROJECTIONS)
        require(isinstance(self.hidden_act, str), "hidden_act", self.hidden_act, "a name")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            allowed = f"divisible by num_attention_heads={heads}, or head_dim given"
            require(self.hidden_size % heads == 0, "hidden_size", self.hidden_size, allowed)
        else:
            integer(self, ("head_dim",), 2)
        even = "even: RoPE rotates pairs of entries of a head"
        require(self.d_head % 2 == 0, "head_dim", self.d_head, even)
        yarn = "above 1 with rope_type='yarn', which divides by its logarithm"
        turning = self.rope_type != "yarn" or self.rope_theta > 1
        require(turning, "rope_theta", self.rope_theta, yarn)
        roomy = self.rope_type != "dynamic" or self.d_head > 2
        allowed = "at least 4 with rope_type='dynamic', which divides by head_dim - 2"
        require(roomy, "head_dim", self.d_head, allowed)
        divides = f"a divisor of num_attention_heads={heads}"
        require(heads % groups == 0, "num_key_value_heads", groups, divides)
        drop, clip = self.attention_dropout, self.clip_qkv
        good = type(drop) in (int, float) and 0 <= drop < 1
        require(good, "attention_dropout", drop, "a number in [0, 1)")
        if clip is not None:
            most = GREATEST_CLIP[self.dtype]
            good = finite(clip) and 0 <= clip <= most
            allowed = (
                f"null (no clamp) or a finite number of at least 0 and at most {most:g}, the "
                f"greatest {self.dtype}"
            )
            require(good, "clip_qkv", clip, allowed)

    def with_weights(self, seed: int) -> ModelSpec:
        """The same model with other weights."""
        return dataclasses.replace(self, weight_seed=seed)

    @property
    def d_head(self) -> int:
        """Size of one head, overridden or not."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def without_clip(self) -> ModelSpec:
        """The same model and weights with no clamp."""
        return dataclasses.replace(self, clip_qkv=None)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An intervention: what one hook does to the tensor at one site, the same on every subject.

    Attributes:
        site: Canonical hook name, for example ``blocks.0.attn.hook_pattern``.
        kind: One of `EDITS`; the ``one_*`` kinds zero a single slice, ``in_place`` scales the
            tensor where it lies and returns nothing.
        seed: Draws the noise, the replacement and the slice that is hit.
    """

    site: str
    kind: str = "scale"
    seed: int = 0

    def __post_init__(self) -> None:
        good = isinstance(self.site, str) and bool(self.site)
        require(good, "site", self.site, "a canonical hook name")
        one_of(self, "kind", EDITS)
        integer(self, ("seed",), 0, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the state machine: what is done to a bridge that then must equal a fresh model.

    Attributes:
        kind: One of `STEPS`.
        site: Canonical hook name, for the kinds of `SITED_STEPS` and for no other.
        edit: What the step's hook does to the tensor there, of `EDITS`.
        flag: The flag that the kind ``flag`` turns over.
        dtype: The dtype that the kind ``cast`` moves to.
        seed: Draws the tokens and chooses among the ways of doing the same; 0 is the plainest.
    """

    kind: str
    site: str = ""
    edit: str = "scale"
    flag: str = ""
    dtype: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, "kind", STEPS)
        one_of(self, "edit", EDITS)
        integer(self, ("seed",), 0, MAX_SEED)
        fields: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
            ("site", SITED_STEPS, ()),
            ("flag", ("flag",), FLAGS),
            ("dtype", ("cast",), DTYPES),
        )
        for name, kinds, values in fields:
            value = getattr(self, name)
            if self.kind not in kinds:
                require(value == "", name, value, f"empty: {self.kind} has no {name}")
            elif values:
                one_of(self, name, values)
            else:
                good = isinstance(value, str) and bool(value)
                require(good, name, value, "a canonical hook name")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run of a model: its input and how it is called.

    Attributes:
        token_seed: Seed of the tokens and of the gradient that is sent back through the logits.
        padding: ``none``; ``left`` or ``right`` by a drawn number of pads, never the whole row;
            ``gap`` masks inner positions; ``rows`` mixes all of these, a row each.
        positions: ``derived`` counts the mask; ``offset`` and ``shuffled`` are given explicitly.
        use_cache: Whether the forward carries a key-value cache, equal on all subjects.
        chunks: Number of successive forwards, over a cache, that the sequence is fed in.
        training: Train mode: dropout is drawn from equal random states.
        prepared: Whether ``adapter.prepare_model`` ran on the model before it was bridged, as
            ``boot_transformers`` does and a direct ``TransformerBridge(...)`` does not.
        edits: Interventions active during the forward.
        processing: Weight processing asked of ``enable_compatibility_mode``, where a check does.
        flags: Flags of a bridge, turned on where a check does. They change nothing by themselves.
        steps: What the state machine does to a bridge, one after the other.
    """

    token_seed: int = 0
    batch: int = 1
    seq_len: int = 2
    padding: str = "none"
    positions: str = "derived"
    use_cache: bool = False
    chunks: int = 1
    training: bool = False
    prepared: bool = True
    edits: tuple[Edit, ...] = ()
    processing: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        integer(self, ("token_seed",), 0, MAX_SEED)
        integer(self, ("batch", "seq_len"), 1)
        integer(self, ("chunks",), 1, self.seq_len)
        one_of(self, "padding", PADDINGS)
        one_of(self, "positions", POSITIONS)
        boolean(self, "use_cache", "training", "prepared")
        cached = f"true, since chunks={self.chunks} need a cache"
        require(self.use_cache or self.chunks == 1, "use_cache", self.use_cache, cached)
        subset(self, "processing", PROCESSING)
        subset(self, "flags", FLAGS)
        legal = f"without one of {sorted(EXCLUSIVE)}, which exclude each other"
        require(not set(self.flags) >= EXCLUSIVE, "flags", self.flags, legal)
        tuple_of(self, "edits", Edit, "a list of edits")
        tuple_of(self, "steps", Step, "a list of steps")


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """One more run of subjects that are built already, with other weights in their place.

    Attributes:
        weight_seed: Seed of every weight and bias, which are drawn anew before the run.
        run: The run.
    """

    weight_seed: int = 0
    run: RunSpec = field(default_factory=RunSpec)

    def __post_init__(self) -> None:
        integer(self, ("weight_seed",), 0, MAX_SEED)
        require(isinstance(self.run, RunSpec), "run", self.run, "a RunSpec")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a run of it: all that one differential comparison needs.

    Attributes:
        tokens: Explicit token ids ``[batch, pos]``; drawn from ``run.token_seed`` when empty.
        reruns: What the same subjects run after it, where a check does so.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    run: RunSpec = field(default_factory=RunSpec)
    tokens: tuple[tuple[int, ...], ...] = ()
    reruns: tuple[Rerun, ...] = ()

    def __post_init__(self) -> None:
        require(isinstance(self.model, ModelSpec), "model", self.model, "a ModelSpec")
        require(isinstance(self.run, RunSpec), "run", self.run, "a RunSpec")
        tuple_of(self, "reruns", Rerun, "a list of reruns")
        room = self.model.max_position_embeddings
        allowed = f"at most max_position_embeddings={room}"
        for wanted in (self.run.seq_len, *(rerun.run.seq_len for rerun in self.reruns)):
            require(wanted <= room, "seq_len", wanted, allowed)
        shape = (self.run.batch, self.run.seq_len)
        good = isinstance(self.tokens, (tuple, list))
        good = good and all(isinstance(row, (tuple, list)) for row in self.tokens)
        require(good, "tokens", self.tokens, f"{shape[0]} rows of {shape[1]} token ids")
        object.__setattr__(self, "tokens", tuple(tuple(row) for row in self.tokens))
        if not self.tokens:
            return
        good = len(self.tokens) == shape[0] and all(len(row) == shape[1] for row in self.tokens)
        require(good, "tokens", self.tokens, f"{shape[0]} rows of {shape[1]} token ids")
        for token in (token for row in self.tokens for token in row):
            good = type(token) is int and 0 <= token < self.model.vocab_size
            last = self.model.vocab_size - 1
            require(good, "tokens", token, f"a token id in 0..{last} (vocab_size - 1)")
