"""PyTorch's own hooks, on the components of a bridge and on Hugging Face's modules in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge.generalized_components import AttentionBridge

from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, exact_gaps, in_one_forward, turn
from conformance.compare import Gap
from conformance.observe import observe
from conformance.parts import Part, parts
from conformance.recorder import Observation
from conformance.spec import Case
from conformance.strategies import cases, legal_flags, run_specs
from conformance.subjects import Subject, bridged, reference

Seen = Mapping[str, list[tuple[torch.Tensor, ...]]]


def _halved(_module: nn.Module, _args: Any, output: Any) -> Any:
    """The output with its first tensor halved."""
    return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2


def _heard(
    subject: Subject, case: Case, modules: Mapping[str, nn.Module], edited: str
) -> tuple[Observation, Seen]:
    """One forward with a hook on each module, and an edit on one: what every call gave.

    The edit comes after what its own module shows. All are taken off again.
    """
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        def keeping(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            seen[name].append(tuple(tensor.detach().clone() for tensor in tensors))

        return keeping

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    handles.append(modules[edited].register_forward_hook(_halved))
    shown = observe(subject, case, backward=False)
    for handle in handles:
        handle.remove()
    return shown, seen


def _bridge_modules(subject: Subject, every: list[Part]) -> dict[str, nn.Module]:
    """Components by their paths, and what they wrap; an attention bridge calls no module."""
    found: dict[str, nn.Module] = {}
    for part in every:
        component: Any = bridge_of(subject).get_submodule(part.path)
        found[part.path] = component
        if part.role is not AttentionBridge:
            found[f"{part.path}.original_component"] = component.original_component
    return found


@check(
    "hook_api.torch",
    "PyTorch's own forward hooks on every component, and on the module it wraps (but attention's, "
    "which is not run), are called once a forward, under flags too, see what the same hooks see on "
    "Hugging Face's model, and what one of them returns has the effect that it has there.",
    lambda: cases(runs=lambda model: run_specs(model, flags=legal_flags())),
    examples=0.15,
)
def torch_hooks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One module's output is halved, on the bridge outside or inside of the component."""
    case, draw = in_one_forward(case), drawing(case)
    every = parts(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    if draw(3):
        turn(subject, case.run.flags, True)
    modules = _bridge_modules(subject, every)
    edited = list(modules)[draw(len(modules))]
    truth = reference(case.model)
    there = {part.path: truth.model.get_submodule(part.module) for part in every}
    expected, due = _heard(truth, case, there, edited.removesuffix(".original_component"))
    actual, got = _heard(subject, case, modules, edited)
    when = f"with the output of {edited} halved"
    yield from logits_gap(expected, actual, f"logits {when}")
    for name, calls in got.items():
        path = name.removesuffix(".original_component")
        if len(calls) != len(due[path]):
            told = f"its PyTorch hooks are called {len(calls)} times, not {len(due[path])}"
            yield Gap(name, "contract", told)
        for wanted, tensors in zip(due[path], calls, strict=False):
            if name == path and edited == f"{path}.original_component":
                wanted = _halved(modules[edited], (), wanted)
            yield from exact_gaps(_numbered(name, wanted), _numbered(name, tensors))


def _numbered(name: str, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return {f"{name}, output {at}": tensor for at, tensor in enumerate(tensors)}
