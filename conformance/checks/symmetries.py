"""Relations between weights: models that must compute the same, or the same rearranged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.metamorphic import whole_runs
from conformance.checks.registry import Adapter, check
from conformance.checks.relations import nudged, related_gaps, reweigh, underived
from conformance.compare import Gap, compare_parameters, compare_tensors
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.spec import GREATEST_CLIP, PROJECTIONS, Case, ModelSpec, RunSpec
from conformance.strategies import HEAD_PAIRS, WIDE_DTYPES, cases, model_specs, run_specs
from conformance.subjects import bridged, reference
from conformance.tolerance import of_sum

_GROUPED = st.sampled_from([(heads, groups) for heads, groups in HEAD_PAIRS if heads > groups])


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.model.weight_seed + 1)


def _module(name: str) -> str:
    """The module of a parameter: ``q_proj``, ``embed_tokens`` and so on."""
    return name.split(".")[-2]


Value = TypeVar("Value")

# Sites that carry what a projection makes, by what rescaling or rearranging it does to them.
_QUERIES = ("attn.q.hook_out", "attn.hook_q_clipped", "attn.hook_rot_q")
_KEYS = ("attn.k.hook_out", "attn.hook_k_clipped", "attn.hook_rot_k")
_VALUES = ("attn.v.hook_out", "attn.hook_v_clipped")
_Z = ("attn.o.hook_in",)
_NEURONS = ("mlp.gate.hook_out", "mlp.in.hook_out", "mlp.out.hook_in")


def _hook(name: str) -> str:
    """A site's name within its block."""
    return name.split(".", 2)[-1] if name.startswith("blocks.") else name


@check(
    "symmetry.scaling",
    "Queries times powers of two, of either sign, and keys divided by them; values and the "
    "output's columns; the MLP's linear branch and its output: the model stays, bit for bit.",
    lambda: cases(runs=whole_runs),
    examples=0.3,
)
def scaling(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Group by group, with weights changed under a bridge that has run. A clamp bears signs only.

    Rounding knows no powers of two. So entries of 2**30 and 2**-30 must give the same bits: nothing
    in a bridge may depend on how large a number is.
    """
    model, draw = case.model, _generator(case)
    groups, heads = model.num_key_value_heads, model.num_attention_heads
    # float16 has no room for more, and what is clamped is not scaled.
    most = 0 if model.clip_qkv is not None or model.dtype == "float16" else 30

    def powers(many: int) -> torch.Tensor:
        exponents = torch.randint(-most, most + 1, (many,), generator=draw)
        signs = torch.randint(0, 2, (many,), generator=draw) * 2.0 - 1
        return signs * torch.exp2(exponents.double())

    by_group = {letter: powers(groups) for letter in "qv"}
    per_head = {x: by_group[x].repeat_interleave(heads // groups) for x in "qv"}
    linear = powers(1)
    rows = {
        "q_proj": per_head["q"].repeat_interleave(model.d_head),
        "k_proj": (1 / by_group["q"]).repeat_interleave(model.d_head),
        "v_proj": by_group["v"].repeat_interleave(model.d_head),
        "up_proj": linear,
    }
    columns = {
        "o_proj": (1 / per_head["v"]).repeat_interleave(model.d_head),
        "down_proj": 1 / linear,
    }

    def scaled(name: str, weight: torch.Tensor) -> torch.Tensor:
        module = _module(name)
        if module in rows:
            factor = rows[module]
            weight = weight * (factor[:, None] if weight.ndim == 2 else factor).to(weight.dtype)
        elif module in columns and weight.ndim == 2:
            weight = weight * columns[module].to(weight.dtype)
        return weight

    sites = {
        **dict.fromkeys(_QUERIES, per_head["q"][:, None]),
        **dict.fromkeys(_KEYS, 1 / by_group["q"][:, None]),
        **dict.fromkeys(_VALUES, by_group["v"][:, None]),
        **dict.fromkeys(_Z, per_head["v"][:, None]),
        "mlp.in.hook_out": linear,
        "mlp.out.hook_in": linear,
    }

    def related(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        factor = sites.get(_hook(name))
        if factor is None:
            return due, got
        factor = (factor if kind == "value" else 1 / factor).to(due.dtype)
        return due * factor, got

    subject = bridged(model, adapter, prepared=case.run.prepared)
    observe(subject, case)
    reweigh(subject, scaled)
    every = sites_of(subject, case)
    expected = observe(reference(model), case, sites=every)
    actual = observe(subject, case, sites=underived(every))
    yield from related_gaps(expected, actual, every, related)


@check(
    "symmetry.units",
    "Heads in another order, whole groups and within them, and neurons in another order: their "
    "own hooks show that order, everything else stays.",
    lambda: cases(models=model_specs(dtypes=WIDE_DTYPES), runs=whole_runs),
    examples=0.25,
)
def units(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """But for rounding, with weights changed under a bridge that has run."""
    model, draw = case.model, _generator(case)
    groups = model.num_key_value_heads
    size = model.num_attention_heads // groups
    by_group = torch.randperm(groups, generator=draw)
    by_head = torch.cat([group * size + torch.randperm(size, generator=draw) for group in by_group])
    neurons = torch.randperm(model.intermediate_size, generator=draw)

    def spread(order: torch.Tensor) -> torch.Tensor:
        return (order[:, None] * model.d_head + torch.arange(model.d_head)).flatten()

    rows = {
        "q_proj": spread(by_head),
        "k_proj": spread(by_group),
        "v_proj": spread(by_group),
        "gate_proj": neurons,
        "up_proj": neurons,
    }
    columns = {"o_proj": spread(by_head), "down_proj": neurons}

    def ordered(name: str, weight: torch.Tensor) -> torch.Tensor:
        module = _module(name)
        if module in rows:
            return weight[rows[module]]
        return weight[:, columns[module]] if module in columns and weight.ndim == 2 else weight

    sites = {
        **dict.fromkeys((*_QUERIES, *_Z), (2, by_head)),
        **dict.fromkeys((*_KEYS, *_VALUES), (2, by_group)),
        **dict.fromkeys(("attn.hook_attn_scores", "attn.hook_pattern"), (1, by_head)),
        **dict.fromkeys(_NEURONS, (2, neurons)),
    }

    def related(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        dim, order = sites.get(_hook(name), (0, None))
        return (due if order is None else due.index_select(dim, order)), got

    subject, truth = bridged(model, adapter, prepared=case.run.prepared), reference(model)
    observe(subject, case)
    reweigh(subject, ordered)
    every = sites_of(subject, case)
    expected, moved = observe(truth, case, sites=every, backward=False), nudged(truth, case, every)
    actual = observe(subject, case, sites=underived(every), backward=False)
    yield from related_gaps(expected, actual, every, related, moved=moved)


@check(
    "symmetry.groups",
    "A model whose key-value heads are repeated into one for each query head is the same model.",
    lambda: cases(models=model_specs(dtypes=WIDE_DTYPES, heads=_GROUPED), runs=whole_runs),
    examples=0.2,
)
def groups(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """But for rounding: the bridge has all heads, the reference has the groups."""
    model, truth = case.model, reference(case.model)
    size = model.num_attention_heads // model.num_key_value_heads
    # Drawn first: a model of these shapes has no weights of its own on file.
    full = replace(model, num_key_value_heads=model.num_attention_heads, weights="drawn")

    def repeated(name: str, weight: torch.Tensor) -> torch.Tensor:
        grouped = truth.parameters[name].detach()
        if _module(name) not in ("k_proj", "v_proj"):
            return grouped
        heads = grouped.view(-1, model.d_head, *grouped.shape[1:])
        return heads.repeat_interleave(size, 0).flatten(0, 1)

    def related(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        if _hook(name) not in (*_KEYS, *_VALUES):
            return due, got
        return due.repeat_interleave(size, 2), got

    subject = bridged(full, adapter, prepared=case.run.prepared)
    reweigh(subject, repeated)
    every = sites_of(subject, case)
    expected, moved = observe(truth, case, sites=every, backward=False), nudged(truth, case, every)
    actual = observe(subject, replace(case, model=full), sites=underived(every), backward=False)
    yield from related_gaps(expected, actual, every, related, moved=moved)


def runs_of_words(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """As `whole_runs`, of several tokens, half of them without a mask."""
    return run_specs(
        model,
        lengths=st.sampled_from((*range(2, 10), 24)),
        paddings=st.sampled_from(("none", "right", "none", "gap")),
        chunks=st.just(1),
        trainings=st.just(False),
    )


@check(
    "symmetry.vocabulary",
    "Tokens are names: with the words of the vocabulary in another order, the model is the same, "
    "whatever token now has the padding's number.",
    lambda: cases(runs=runs_of_words),
    examples=0.3,
)
def vocabulary(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bitwise up to the last site, with weights changed under a bridge that has run."""
    model, data = case.model, inputs(case)
    order = torch.randperm(model.vocab_size, generator=_generator(case))

    def renamed(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight[order] if _module(name) in ("embed_tokens", "lm_head") else weight

    def related(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        if name in ("embed.hook_in", "unembed.hook_out", "logits"):
            return None
        return due, got

    subject, truth = bridged(model, adapter, prepared=case.run.prepared), reference(model)
    observe(subject, case)
    reweigh(subject, renamed)
    every = sites_of(subject, case)
    expected = observe(truth, case, sites=every, backward=False)
    words = replace(data, tokens=order.argsort()[data.tokens])
    actual = observe(subject, case, sites=underived(every), data=words, backward=False)
    yield from related_gaps(expected, actual, every, related)
    read, weight = expected.values["unembed.hook_in"], truth.model.lm_head.weight.detach()
    size = float((read.double().abs() @ weight.double().abs().T).max())
    allowance = of_sum(read.dtype, size)
    gap = compare_tensors("logits", expected.logits[..., order], actual.logits, allowance)
    yield from [gap] if gap else []


@check(
    "symmetry.neutral",
    "A block that writes nothing, biases of zero and a clip beyond all numbers change nothing.",
    lambda: cases(runs=whole_runs),
    examples=0.3,
)
def neutral(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bitwise: the bridge has all three, and the reference none of them that it had not before."""
    model, truth = case.model, reference(case.model)
    at = case.run.token_seed % (model.num_hidden_layers + 1)
    clip = GREATEST_CLIP[model.dtype] if model.clip_qkv is None else model.clip_qkv
    more = replace(
        model,
        num_hidden_layers=model.num_hidden_layers + 1,
        biases=PROJECTIONS,
        clip_qkv=clip,
        weights="drawn",
    )

    def before(name: str) -> str | None:
        """The name that a parameter or site has without the block; None inside of it."""
        head, dot, rest = name.partition(".layers." if ".layers." in name else "blocks.")
        number, _, tail = rest.partition(".")
        if not dot or int(number) == at:
            return None if dot else name
        return f"{head}{dot}{int(number) - (int(number) > at)}.{tail}"

    def extended(name: str, weight: torch.Tensor) -> torch.Tensor:
        its = truth.parameters.get(before(name) or "")
        if its is not None:
            return its.detach()
        silent = name.endswith(".bias") or _module(name) in ("o_proj", "down_proj")
        return weight * 0 if silent else weight

    def shortened(tensors: Mapping[str, Value]) -> dict[str, Value]:
        named = ((before(name), tensor) for name, tensor in tensors.items())
        return {name: tensor for name, tensor in named if name is not None}

    subject = bridged(more, adapter, prepared=case.run.prepared)
    reweigh(subject, extended)
    longer = replace(case, model=more)
    found = observe(subject, longer, sites=underived(sites_of(subject, longer)))
    actual = replace(
        found,
        values=shortened(found.values),
        gradients=shortened(found.gradients),
        parameter_gradients=shortened(found.parameter_gradients),
    )
    every = sites_of(subject, case)
    expected = observe(truth, case, sites=every)
    yield from related_gaps(expected, actual, every, lambda name, kind, *both: both)
    yield from compare_parameters(expected, actual)
