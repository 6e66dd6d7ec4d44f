"""The one table of sites: each hook of a bridged OLMo, and where Hugging Face computes its tensor.

The table's order is the order of execution: whatever a later row sees may depend on an earlier one.
A *place* is a port of a Hugging Face module that can be observed and edited from outside, with no
copy of the model's code (see `conformance.reference`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from itertools import groupby

from conformance.spec import FLAGS, ModelSpec


class Status(Enum):
    """What the presence of a site means."""

    REQUIRED = "every OLMo bridge has it and fires it"
    OPTIONAL = "only an adapter that declares it has it"
    FLAGGED = "fires only under its flag"
    DEAD = "advertised by upstream, never fires"


class Layout(Enum):
    """How a hook's tensor is laid out, next to the tensor at its place."""

    SAME = "as Hugging Face holds it"
    HEADS = "[batch, pos, heads * d_head] split into [batch, pos, head, d_head]"
    SWAPPED = "[batch, head, pos, d_head] turned into [batch, pos, head, d_head]"
    FORKED = "one [batch, pos, d_model] for each head: [batch, pos, head, d_model]"


class Port(Enum):
    """Where at a module a tensor is seen."""

    IN = "the module's hidden states"
    OUT = "the module's output"
    SCALE = "a LayerNorm's denominator: inside a fused kernel, so recomputed"
    COS = "the cosine that an attention is given"
    SIN = "the sine that an attention is given"
    FIRST = "the first of the module's two outputs"
    SECOND = "the second of the module's two outputs"
    CLIPPED = "a projection's output after the in-place clamp"
    QUERY = "the rotated query that the attention function is given"
    KEY = "the rotated key, before a cache extends it"
    SCORES = "the argument of the attention's softmax: scaled and masked"
    PATTERN = "the output of the attention's dropout"


@dataclass(frozen=True)
class Site:
    """One hook of a bridged OLMo.

    Attributes:
        name: Canonical hook name; ``{i}`` stands for the block's index.
        module: Hugging Face module that computes the tensor.
        port: Where at that module.
        layout: Layout of the hook's tensor.
        aliases: Other names of the same hook.
        status: What its presence means.
        flag: The configuration flag that turns a ``FLAGGED`` site on.
        derived: How the value follows from what can be observed, where that is not the tensor
            at the place itself: compared with an allowance (see `conformance.tolerance`).
        reason: Why a site is dead.
    """

    name: str
    module: str
    port: Port
    layout: Layout = Layout.SAME
    aliases: tuple[str, ...] = ()
    status: Status = Status.REQUIRED
    flag: str = ""
    derived: str = ""
    reason: str = ""

    def at(self, block: int) -> Site:
        """The same site in one block."""
        fill = {"name": self.name, "module": self.module}
        named = {field: text.replace("{i}", str(block)) for field, text in fill.items()}
        aliases = tuple(alias.replace("{i}", str(block)) for alias in self.aliases)
        return replace(self, **named, aliases=aliases)  # type: ignore[arg-type]


POST_CLIP = tuple(f"blocks.{{i}}.attn.hook_{letter}_clipped" for letter in "qkv")


def _linear(name: str, module: str, alias_in: str = "", alias_out: str = "") -> tuple[Site, Site]:
    into = Site(f"{name}.hook_in", module, Port.IN, aliases=(alias_in,) if alias_in else ())
    out = Site(f"{name}.hook_out", module, Port.OUT, aliases=(alias_out,) if alias_out else ())
    return into, out


def _norm(name: str, module: str, alias_in: str = "") -> tuple[Site, ...]:
    scale = (
        "sqrt(var(x) + 1e-5) in float32: the denominator inside torch's fused layer_norm, with "
        "the eps of transformers' OlmoLayerNorm.forward"
    )
    output = "the module's output: an OlmoLayerNorm has no weight and no bias"
    into, out = _linear(name, module, alias_in)
    return (
        into,
        Site(f"{name}.hook_scale", module, Port.SCALE, derived=scale),
        Site(f"{name}.hook_normalized", module, Port.OUT, derived=output),
        out,
    )


def _gated(
    name: str, flag: str, module: str, layout: Layout = Layout.FORKED, aliases: tuple[str, ...] = ()
) -> Site:
    """A site that fires under a flag only. `conformance.forks` knows what it carries."""
    status = Status.FLAGGED
    return Site(name, module, Port.IN, layout, aliases, status=status, flag=flag)


def _inputs(attn: str) -> tuple[Site, ...]:
    """What the heads read: the residual stream before the LayerNorm, once for each."""
    norm = "model.layers.{i}.input_layernorm"
    flags = {f"hook_{letter}_input": "use_split_qkv_input" for letter in "qkv"}
    return tuple(
        _gated(f"{attn}.{hook}", flag, norm, aliases=(f"blocks.{{i}}.{hook}",))
        for hook, flag in {**flags, "hook_attn_in": "use_attn_in"}.items()
    )


def _attention() -> tuple[Site, ...]:
    attn, module = "blocks.{i}.attn", "model.layers.{i}.self_attn"
    into = {
        letter: Site(f"{attn}.{letter}.hook_in", f"{module}.{letter}_proj", Port.IN)
        for letter in "qkv"
    }
    out = {
        letter: Site(
            f"{attn}.{letter}.hook_out",
            f"{module}.{letter}_proj",
            Port.OUT,
            Layout.HEADS,
            (f"{attn}.hook_{letter}",),
        )
        for letter in "qkv"
    }
    clipped = tuple(
        Site(
            f"{attn}.hook_{letter}_clipped",
            f"{module}.{letter}_proj",
            Port.CLIPPED,
            Layout.HEADS,
            status=Status.OPTIONAL,
        )
        for letter in "qkv"
    )
    return (
        Site(f"{attn}.hook_in", module, Port.IN),
        *_inputs(attn),
        *(site for letter in "qkv" for site in (into[letter], out[letter])),
        *clipped,
        Site(f"{attn}.hook_cos", module, Port.COS),
        Site(f"{attn}.hook_sin", module, Port.SIN),
        Site(f"{attn}.hook_rot_q", module, Port.QUERY, Layout.SWAPPED),
        Site(f"{attn}.hook_rot_k", module, Port.KEY, Layout.SWAPPED),
        Site(f"{attn}.hook_attn_scores", module, Port.SCORES),
        Site(f"{attn}.hook_pattern", module, Port.PATTERN),
        Site(f"{attn}.o.hook_in", f"{module}.o_proj", Port.IN, Layout.HEADS, (f"{attn}.hook_z",)),
        _gated(f"{attn}.hook_result", "use_attn_result", f"{module}.o_proj"),
        Site(f"{attn}.o.hook_out", f"{module}.o_proj", Port.OUT),
        Site(f"{attn}.hook_out", module, Port.FIRST, aliases=("blocks.{i}.hook_attn_out",)),
    )


_DEAD = (
    Site(
        "rotary_emb.hook_out",
        "model.rotary_emb",
        Port.FIRST,
        aliases=("hook_pos_embed",),
        status=Status.DEAD,
        reason="the module returns a pair, which has hooks of its own: hook_cos and hook_sin",
    ),
    Site(
        "blocks.{i}.attn.hook_hidden_states",
        "model.layers.{i}.self_attn",
        Port.IN,
        status=Status.DEAD,
        reason="created for every attention bridge, fired by none that reimplements attention",
    ),
)

_BLOCK = (
    Site("blocks.{i}.hook_in", "model.layers.{i}", Port.IN, aliases=("blocks.{i}.hook_resid_pre",)),
    *_norm("blocks.{i}.ln1", "model.layers.{i}.input_layernorm"),
    *_attention(),
    _gated(
        "blocks.{i}.hook_mlp_in",
        "use_hook_mlp_in",
        "model.layers.{i}.post_attention_layernorm",
        Layout.SAME,
    ),
    *_norm(
        "blocks.{i}.ln2", "model.layers.{i}.post_attention_layernorm", "blocks.{i}.hook_resid_mid"
    ),
    Site("blocks.{i}.mlp.hook_in", "model.layers.{i}.mlp", Port.IN),
    *_linear(
        "blocks.{i}.mlp.gate",
        "model.layers.{i}.mlp.gate_proj",
        alias_out="blocks.{i}.mlp.hook_pre",
    ),
    *_linear(
        "blocks.{i}.mlp.in",
        "model.layers.{i}.mlp.up_proj",
        alias_out="blocks.{i}.mlp.hook_pre_linear",
    ),
    *_linear(
        "blocks.{i}.mlp.out",
        "model.layers.{i}.mlp.down_proj",
        alias_in="blocks.{i}.mlp.hook_post",
    ),
    Site(
        "blocks.{i}.mlp.hook_out",
        "model.layers.{i}.mlp",
        Port.OUT,
        aliases=("blocks.{i}.hook_mlp_out",),
    ),
    Site(
        "blocks.{i}.hook_out", "model.layers.{i}", Port.OUT, aliases=("blocks.{i}.hook_resid_post",)
    ),
)

TABLE = (
    *_linear("embed", "model.embed_tokens", alias_out="hook_embed"),
    Site("rotary_emb.hook_in", "model.rotary_emb", Port.IN),
    Site("rotary_emb.hook_cos", "model.rotary_emb", Port.FIRST),
    Site("rotary_emb.hook_sin", "model.rotary_emb", Port.SECOND),
    *_BLOCK,
    *_norm("ln_final", "model.norm"),
    *_linear("unembed", "lm_head", alias_out="hook_unembed"),
    *_DEAD,
)

# The projections whose outputs attention clamps in place, in the order in which it makes them.
CLAMPED = tuple(site.module.rpartition(".")[2] for site in TABLE if site.port is Port.CLIPPED)


def _expand(rows: Iterable[Site], layers: int) -> Iterator[Site]:
    """The rows in order of execution, each run of block rows repeated for every block."""
    for repeated, run in groupby(rows, key=lambda site: "{i}" in site.name):
        group = tuple(run)
        for block in range(layers if repeated else 1):
            yield from (site.at(block) for site in group)


@cache
def _every_site(layers: int) -> tuple[Site, ...]:
    return tuple(_expand(TABLE, layers))


def sites(model: ModelSpec) -> dict[str, Site]:
    """Every site that the table knows for a model, by canonical name, in order of execution."""
    return {site.name: site for site in _every_site(model.num_hidden_layers)}


def fired_rows(optional: Collection[str] = ()) -> list[Site]:
    """The rows of the table that fire in a plain forward, ``{i}`` standing for the block.

    Args:
        optional: Hook patterns that the adapter under test declares.
    """
    return [
        site
        for site in TABLE
        if site.status is Status.REQUIRED
        or (site.status is Status.OPTIONAL and site.name in optional)
    ]


def observable(model: ModelSpec, optional: Collection[str] = ()) -> dict[str, Site]:
    """The sites that fire in a plain forward, by canonical name, in order of execution.

    Args:
        model: The model whose blocks are counted.
        optional: Hook patterns that the adapter under test declares.
    """
    return dict(observable_in(model.num_hidden_layers, tuple(optional)))


@cache
def observable_in(layers: int, optional: tuple[str, ...]) -> Mapping[str, Site]:
    """As `observable`, for so many layers."""
    return {site.name: site for site in _expand(fired_rows(optional), layers)}


def behind_flags(model: ModelSpec, flags: Collection[str] = FLAGS) -> dict[str, Site]:
    """The sites that fire under some flags only, by canonical name, in order of execution."""
    every = sites(model).items()
    return {name: site for name, site in every if site.flag and site.flag in flags}
