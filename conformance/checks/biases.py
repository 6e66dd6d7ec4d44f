"""The optional parameters: biases that may be missing from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformer_lens.model_bridge import TransformerBridge

from conformance.checks.registry import Adapter, check
from conformance.compare import Gap, compare_parameters, compare_tensors
from conformance.observe import observe
from conformance.spec import PROJECTIONS, Case
from conformance.strategies import cases
from conformance.subjects import at_work, bridged, reference
from conformance.tolerance import exactly

_MLP = ("in", "gate", "out")


def _present(bridge: TransformerBridge, case: Case) -> Iterator[Gap]:
    """The state dict has the biases that the model has, and no others of the seven."""
    keys = set(bridge.state_dict())  # type: ignore[no-untyped-call]
    for block in range(case.model.num_hidden_layers):
        attn = {f"blocks.{block}.attn.{letter}.bias": letter for letter in PROJECTIONS}
        mlp = {f"blocks.{block}.mlp.{name}.bias": "" for name in _MLP}
        for key, letter in {**attn, **mlp}.items():
            if (key in keys) != (letter in case.model.biases and letter != ""):
                kind = "extra" if key in keys else "missing"
                yield Gap(key, kind, f"state dict of a model with biases {case.model.biases}")


def _component_gaps(
    bridge: TransformerBridge, case: Case, weights: dict[str, torch.Tensor]
) -> Iterator[Gap]:
    """Each component has its bias, head by head, or None."""
    model = case.model
    for block in range(model.num_hidden_layers):
        attn, mlp = bridge.blocks[block].attn, bridge.blocks[block].mlp
        for letter in PROJECTIONS:
            name, value = (
                f"blocks.{block}.attn.b_{letter.upper()}",
                getattr(attn, f"b_{letter.upper()}"),
            )
            due = weights.get(f"model.layers.{block}.self_attn.{letter}_proj.bias")
            if due is None or value is None:
                if due is not value:
                    yield Gap(name, "contract", f"is {value!r:.40}, the model has {due!r:.40}")
                continue
            due = due if letter == "o" else due.reshape(-1, model.d_head)
            gap = compare_tensors(name, due, value, exactly(due.dtype))
            yield from [gap] if gap else []
        for part in _MLP:
            value = getattr(mlp, f"b_{part}")
            if value is not None:
                yield Gap(f"blocks.{block}.mlp.b_{part}", "contract", "is not None")


def _stacked(bridge: TransformerBridge, case: Case) -> Iterator[Gap]:
    """A stacked accessor of a missing bias raises an AttributeError that names it."""
    missing = {f"b_{letter.upper()}" for letter in PROJECTIONS if letter not in case.model.biases}
    for name in sorted(missing | {"b_in", "b_out", "b_gate"}):
        try:
            value = getattr(bridge, name)
        except AttributeError as error:
            if not re.search(rf"\b{name}\b", str(error)):
                yield Gap(name, "contract", f"AttributeError does not name it: {error}")
        except Exception as error:
            kind = type(error).__name__
            yield Gap(name, "contract", f"{kind} instead of an AttributeError: {error}")
        else:
            yield Gap(name, "contract", f"is {value!r:.40} instead of an AttributeError")


@check(
    "biases.optional",
    "The seven optional biases are in the state dict, on the component and on the stacked accessor "
    "just where the model has them.",
    cases,
    examples=0.4,
)
def optional(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Absent from the state dict, None on the component, AttributeError on the accessor."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    weights = {name: parameter.detach() for name, parameter in subject.parameters.items()}
    with at_work("reading the biases"):
        yield from _present(subject.bridge, case)
        yield from _component_gaps(subject.bridge, case, weights)
        yield from _stacked(subject.bridge, case)


@check(
    "biases.forward",
    "A model with all, none or only some of its attention biases has the reference's logits and "
    "gradients, and takes a state dict without the missing ones.",
    cases,
    examples=0.5,
)
def forward(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The weights arrive through the bridge's own state dict, saved from another model."""
    expected = observe(reference(case.model), case)
    source = bridged(case.model, adapter, prepared=case.run.prepared)
    other = replace(case.model, weight_seed=case.model.weight_seed ^ 1)
    target = bridged(other, adapter, prepared=case.run.prepared)
    assert source.bridge is not None
    assert target.bridge is not None
    with at_work("loading a state dict"):
        state = source.bridge.state_dict()  # type: ignore[no-untyped-call]
        saved = {key: tensor.clone() for key, tensor in state.items()}
        target.bridge.load_state_dict(saved)  # type: ignore[no-untyped-call]
    actual = observe(target, case)
    gap = compare_tensors("logits", expected.logits, actual.logits, exactly(expected.logits.dtype))
    yield from [gap] if gap else []
    yield from compare_parameters(expected, actual)
