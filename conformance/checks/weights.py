"""Weights: every accessor is Hugging Face's tensor rearranged, and the parameter itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import exact_gaps
from conformance.compare import Gap
from conformance.inputs import inputs
from conformance.observe import observe
from conformance.parts import accessors, parameter, parts, stacked, weights
from conformance.spec import Case, ModelSpec
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference


def squared(model: ModelSpec) -> ModelSpec:
    """The model with some sizes made equal, so that no shape tells a matrix from its transpose."""
    seed, hidden = model.weight_seed, model.hidden_size
    groups = model.num_key_value_heads * model.d_head
    if seed & 8 and model.head_dim is not None:
        hidden = groups
    return replace(
        model,
        hidden_size=hidden,
        intermediate_size=hidden if seed & 1 else model.intermediate_size,
        vocab_size=hidden if seed & 2 else model.vocab_size,
    )


def shaped_cases() -> SearchStrategy[Case]:
    """Cases of every head geometry, most of them with a square matrix or two."""
    return cases(models=model_specs().map(squared))


def deep_cases() -> SearchStrategy[Case]:
    """As `shaped_cases`, some with eleven blocks: the last one has a number of two digits.

    Of these each has a bias of the output, so that the sum of all has a summand of each.
    """

    def biased(model: ModelSpec) -> ModelSpec:
        deep = model.num_hidden_layers == 11 and "o" not in model.biases
        return replace(model, biases=(*model.biases, "o")) if deep else model

    layers = st.sampled_from((1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 11, 11))
    return cases(models=model_specs(layers=layers).map(squared).map(biased))


def read(bridge: TransformerBridge, model: ModelSpec) -> dict[str, Any]:
    """What each accessor of a component gives, by its full name."""
    found = {}
    for full, _, _ in accessors(model):
        path, _, name = full.rpartition(".")
        found[full] = getattr(bridge.get_submodule(path), name)
    return found


def accessor_gaps(subject: Subject, model: ModelSpec, stage: str = "") -> Iterator[Gap]:
    """Every accessor of a component against the parameters that the subject has now."""
    assert subject.bridge is not None
    due = weights(dict(subject.parameters), model)
    with at_work(f"reading the weights{stage}"):
        got = read(subject.bridge, model)
    for gap in exact_gaps(due, got):
        yield replace(gap, site=f"{gap.site}{stage}")


def _refusals(bridge: TransformerBridge) -> Iterator[Gap]:
    """OLMo has no matrix of positions: both accessors of one say so."""
    for name in ("W_pos", "W_E_pos"):
        try:
            value = getattr(bridge, name)
        except AttributeError as error:
            if "W_pos" not in str(error):
                yield Gap(name, "contract", f"the error does not name W_pos: {error}")
        else:
            yield Gap(name, "contract", f"is {value!r:.40} instead of an AttributeError")


def _lens_parameters(found: dict[str, torch.Tensor | None], model: ModelSpec) -> dict[str, Any]:
    """As ``tl_parameters`` has them: keys and values repeated by head, zeros for a missing bias."""
    groups = model.num_attention_heads // model.num_key_value_heads
    widths = {
        **dict.fromkeys(("b_Q", "b_K", "b_V"), (model.num_attention_heads, model.d_head)),
        **dict.fromkeys(("b_O", "b_out"), (model.hidden_size,)),
        "b_in": (model.intermediate_size,),
    }
    due = {}
    for full, tensor in found.items():
        name = full.rpartition(".")[2]
        if tensor is None:
            if name in widths:
                due[full] = torch.zeros(widths[name], dtype=getattr(torch, model.dtype))
            continue
        repeated = name in ("W_K", "W_V", "b_K", "b_V")
        due[full] = tensor.repeat_interleave(groups, dim=0) if repeated else tensor
    return due


def _accumulated(found: dict[str, torch.Tensor | None], layers: int) -> torch.Tensor:
    """The biases that attention adds to the residual stream, up to a layer, ``[d_model]``."""
    total = torch.zeros(found["embed.W_E"].shape[1])  # type: ignore[union-attr]
    for block in range(layers):
        bias = found[f"blocks.{block}.attn.b_O"]
        total = total if bias is None else total + bias
    return total


@check(
    "weights.accessors",
    "Every weight accessor, of a component and of the whole bridge, in tl_parameters and in the "
    "sums made of them, is Hugging Face's tensor rearranged, for every geometry, square ones too.",
    deep_cases,
    examples=0.5,
)
def read_right(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bit for bit, shapes and dtypes included; what there is not is refused."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, model = subject.bridge, case.model
    assert bridge is not None
    yield from accessor_gaps(subject, model)
    found = weights({name: each.detach() for name, each in subject.parameters.items()}, model)
    whole = {name.rpartition(".")[2]: found[name] for name in ("embed.W_E", "unembed.W_U")}
    # There is no stacked b_gate, and no OLMo has one.
    due: dict[str, torch.Tensor | None] = {**whole, **stacked(found, model)}
    due["b_U"] = found["unembed.b_U"]
    tokens = inputs(case).tokens
    block = model.num_hidden_layers - 1
    heads = [(i, h) for i in range(block + 1) for h in range(model.num_attention_heads)]
    labels = [f"L{layer}H{head}" for layer, head in heads]
    younger = [name for name in ("attn_head_labels",) if hasattr(bridge, name)]
    for name in ("all_head_labels", *younger):
        if (told := getattr(bridge, name)) != labels:
            yield Gap(name, "contract", f"{told} instead of {labels}")
    with at_work("reading the weights of the whole bridge"):
        yield from exact_gaps(due, {name: getattr(bridge, name) for name in due})
        yield from _refusals(bridge)
        named = {
            "tl_parameters": bridge.tl_parameters(),
            "tl_named_parameters": dict(bridge.tl_named_parameters()),
            "get_params": bridge.get_params(),  # type: ignore[no-untyped-call]
        }
        for name, got in named.items():
            for gap in exact_gaps(_lens_parameters(found, model), got):
                yield replace(gap, site=f"{name}()[{gap.site!r}]")
        layers, got_q = bridge.stack_params_for("attn", "attn.W_Q")
        if layers != list(range(model.num_hidden_layers)):
            yield Gap("stack_params_for", "contract", f"says that the layers are {layers}")
        sums = {
            "stack_params_for('attn', 'attn.W_Q')": (due["W_Q"], got_q),
            "tokens_to_residual_directions(tokens)": (
                found["unembed.W_U"].T[tokens].squeeze((0, 1) if tokens.numel() == 1 else ()),  # type: ignore[union-attr]
                bridge.tokens_to_residual_directions(tokens),
            ),
        }
        biases = {
            f"accumulated_bias({block})": (block, bridge.accumulated_bias(block)),
            f"accumulated_bias({block + 1})": (block + 1, bridge.accumulated_bias(block + 1)),
            f"accumulated_bias({block}, mlp_input=True)": (
                block + 1,
                bridge.accumulated_bias(block, mlp_input=True),
            ),
        }
        for name, (layers_summed, bias) in biases.items():
            # In float32 or, what a projection needs, in the model's dtype.
            sums[name] = (_accumulated(found, layers_summed).to(bias.dtype), bias)
        yield from exact_gaps(
            {name: pair[0] for name, pair in sums.items()},
            {name: pair[1] for name, pair in sums.items()},
        )


def _drawn(shape: torch.Size, dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=draw).to(dtype)


def _add(parameter: nn.Parameter, change: torch.Tensor) -> None:
    parameter.add_(change, alpha=0.1)


def _add_to_data(parameter: nn.Parameter, change: torch.Tensor) -> None:
    parameter.data.add_(change, alpha=0.1)


def _set_data(parameter: nn.Parameter, change: torch.Tensor) -> None:
    parameter.data = parameter.data.add(change, alpha=0.1)


# Of what is done to `.data` a parameter's version tells nothing.
WRITES = {"": _add, "'s data": _add_to_data, "'s data, set,": _set_data}


def _gradients(
    tensors: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter], seed: int
) -> dict[str, torch.Tensor | None]:
    """What a drawn gradient of each accessor becomes at the parameters."""
    draw = torch.Generator().manual_seed(seed)
    probes = [_drawn(each.shape, each.dtype, draw) for each in tensors.values()]
    live = [
        (t, probe) for t, probe in zip(tensors.values(), probes, strict=True) if t.requires_grad
    ]
    found = torch.autograd.grad(
        [t for t, _ in live], list(parameters.values()), [p for _, p in live], allow_unused=True
    )
    return dict(zip(parameters, found, strict=True))


def _stacked(found: dict[str, torch.Tensor | None], model: ModelSpec) -> dict[str, torch.Tensor]:
    """What the accessors of the whole bridge give, of the weights that there are."""
    due = {"W_E": found["embed.W_E"], "W_U": found["unembed.W_U"], **stacked(found, model)}
    return {name: tensor for name, tensor in due.items() if tensor is not None}


@check(
    "weights.live",
    "Accessors are the parameters themselves: gradients go through them, what is written to a "
    "parameter shows in each, and what is written to a component's accessor, or put in the place "
    "of its weight, shows in the forward.",
    shaped_cases,
    examples=0.4,
)
def live(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Gradients first, then writing from either end, then a weight replaced."""
    model, seed = case.model, case.run.token_seed
    truth = reference(model)
    subject = bridged(model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None

    expected = weights(dict(truth.parameters), model)
    present = _stacked(expected, model)
    names = list(present)
    layers = model.num_hidden_layers
    summed = f"accumulated_bias({layers})"
    with at_work("a gradient through the accessors"):
        got = {name: getattr(bridge, name) for name in present}
        if "b_O" in present:
            got[summed] = bridge.accumulated_bias(layers)
            present[summed] = _accumulated(expected, layers).to(got[summed].dtype)
        actual = _gradients(got, dict(subject.parameters), seed)
    for gap in exact_gaps(_gradients(present, dict(truth.parameters), seed), actual):
        yield replace(gap, site=f"gradient of {gap.site} through the accessors")

    draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
    with torch.no_grad():
        for where, write in WRITES.items():
            for each, draw in zip((truth, subject), draws, strict=True):
                for tensor in each.parameters.values():
                    write(tensor, _drawn(tensor.shape, tensor.dtype, draw))
            yield from accessor_gaps(subject, model, f" after a parameter{where} was written")
            with at_work("reading the stacked weights"):
                got = {name: getattr(bridge, name) for name in names}
            now = _stacked(weights(dict(truth.parameters), model), model)
            for gap in exact_gaps(now, got):
                yield replace(gap, site=f"{gap.site} after a parameter{where} was written")
        for full, name, _ in accessors(model):
            written = parameter(dict(truth.parameters), name)
            if written is None:
                continue
            written.mul_(0.5)
            path, _, attribute = full.rpartition(".")
            with at_work(f"writing to {full}"):
                getattr(bridge.get_submodule(path), attribute).mul_(0.5)
    yield from exact_gaps(
        {f"{name} after its accessor was written": p for name, p in truth.parameters.items()},
        {f"{name} after its accessor was written": p for name, p in subject.parameters.items()},
    )

    weighty = [part for part in parts(model) if part.weight is not None]
    part = weighty[seed % len(weighty)]
    module: Any = truth.model.get_submodule(part.module)
    new = _drawn(module.weight.shape, module.weight.dtype, torch.Generator().manual_seed(seed))
    module.weight = nn.Parameter(new)
    with at_work(f"setting the weight of {part.path}"):
        bridge.get_submodule(part.path).weight = nn.Parameter(new.clone())
    name = f"logits with another {part.path}.weight"
    observed = observe(subject, case, backward=False)
    yield from logits_gap(observe(truth, case, backward=False), observed, name)
