"""The parts that all scripts have: models, weights, inputs, and how a tensor is compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from conformance.inputs import derived_positions, inputs
from conformance.spec import PROJECTIONS, Case, ModelSpec
from conformance.subjects import rope_parameters

WIDTH = 100
BUILDER = "transformer_lens.model_bridge.sources._bridge_builder"


def call(start: str, arguments: Iterable[str], end: str = ")") -> list[str]:
    """A call on one line, or with its arguments below it, as many on a line as fit."""
    arguments = list(arguments)
    whole = f"{start}{', '.join(arguments)}{end}"
    if len(whole) <= WIDTH:
        return [whole]
    lines = ["   "]
    for argument in arguments:
        if len(lines[-1]) + len(argument) + 2 > WIDTH and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {argument},"
    return [start, *lines, end]


def keywords(named: dict[str, Any]) -> list[str]:
    """``name=value``, as source."""

    def written(value: Any) -> str:
        return json.dumps(value) if isinstance(value, (str, dict)) else repr(value)

    return [f"{name}={written(value)}" for name, value in named.items()]


def configuration(model: ModelSpec) -> dict[str, Any]:
    """The arguments of `OlmoConfig` that make the model: sizes, and what is not the default."""
    plain = ModelSpec()
    named: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
    }
    if model.num_key_value_heads != model.num_attention_heads:
        named["num_key_value_heads"] = model.num_key_value_heads
    if (model.rope_type, model.rope_theta) != (plain.rope_type, plain.rope_theta):
        named["max_position_embeddings"] = model.max_position_embeddings
        named["rope_parameters"] = rope_parameters(model)
    odd = (
        *("head_dim", "hidden_act", "tie_word_embeddings", "pad_token_id"),
        *("attention_dropout", "clip_qkv"),
    )
    named.update(
        {name: getattr(model, name) for name in odd if getattr(model, name) != getattr(plain, name)}
    )
    if model.biases:
        named["attention_bias"] = True
    return {**named, "attn_implementation": "eager"}


def build(case: Case) -> list[str]:
    """Two models of the same drawn weights, one of them bridged."""
    model = case.model
    wide = model.dtype == "float32"
    made = "OlmoForCausalLM(config)"
    if not wide:
        made = f"OlmoForCausalLM._from_config(config, dtype=torch.{model.dtype})"
    mode = "train" if case.run.training else "eval"
    missing = [letter for letter in PROJECTIONS if letter not in model.biases]
    absent = []
    if model.biases and missing:
        biases = " = ".join(f"layer.self_attn.{letter}_proj.bias" for letter in missing)
        absent = ["for layer in model.model.layers:", f"    {biases} = None"]
    return [
        *call("config = OlmoConfig(", keywords(configuration(model))),
        f"model = {made}.{mode}()",
        *absent,
        f"draw = torch.Generator().manual_seed({model.weight_seed})",
        "for parameter in model.parameters():",
        "    parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * "
        f"{model.weight_scale})",
        'bridge = build_bridge_from_module(copy.deepcopy(model), "OlmoForCausalLM", '
        "hf_config=config)",
        *([f"bridge.{mode}()"] if case.run.training else []),
    ]


def tensor(name: str, values: torch.Tensor) -> list[str]:
    """A tensor of integers, written out."""
    rows = [str(row) for row in values.tolist()]
    return call(f"{name} = torch.tensor([", rows, "])")


def feed(case: Case) -> list[str]:
    """Tokens, and what else is written out."""
    data, told = inputs(case), _told_positions(case)
    positions = told if data.position_ids is None else data.position_ids
    written = {"tokens": data.tokens, "mask": data.attention_mask, "positions": positions}
    present = {name: values for name, values in written.items() if values is not None}
    return [line for name, values in present.items() for line in tensor(name, values)]


def given(case: Case) -> str:
    """The arguments that both models are given with the tokens."""
    data, named = inputs(case), [f"use_cache={case.run.use_cache}"]
    if data.attention_mask is not None:
        named.append("attention_mask=mask")
    if data.position_ids is not None:
        named.append("position_ids=positions")
    return ", ".join(named)


def _told_positions(case: Case) -> torch.Tensor | None:
    """Positions that a bridge derives from the mask, and Hugging Face's model is told."""
    data = inputs(case)
    if data.position_ids is not None or data.attention_mask is None:
        return None
    return derived_positions(data.attention_mask)


def _seeded(case: Case) -> list[str]:
    """Equal random states, where a forward draws."""
    drawn = case.run.training and case.model.attention_dropout > 0
    return [f"torch.manual_seed({case.run.token_seed})"] if drawn else []


def run_model(case: Case, name: str = "due = ", then: str = "") -> list[str]:
    """A line that runs Hugging Face's model, from a random state of its own if it draws."""
    more = "" if _told_positions(case) is None else ", position_ids=positions"
    taken = ".logits" if name or then else ""
    return [*_seeded(case), f"{name}model(tokens, {given(case)}{more}){taken}{then}"]


def run_bridge(case: Case, name: str = "got = ", then: str = "") -> list[str]:
    """A line that runs the bridge, from the same random state."""
    return [*_seeded(case), f"{name}bridge(tokens, {given(case)}){then}"]


def verdict(what: str, *, allowed: float = 0.0, shapes: bool = False) -> list[str]:
    """Compare ``got`` with ``due``, both tensors, and end with 1 if they differ."""
    if shapes:
        return [
            f'print(f"{what}: {{list(got.shape)}}, expected {{list(due.shape)}}")',
            "raise SystemExit(got.shape != due.shape)",
        ]
    bound = f"{allowed:g}"
    told = f"{what}: off by {{off:.1e}} ({{got.dtype}}), expected {bound} ({{due.dtype}})"
    return [
        "off = (got.double() - due.double()).abs().max().item()",
        *call("print(", [f'f"{told}"']),
        f"raise SystemExit(got.dtype != due.dtype or not off <= {bound})",
    ]
