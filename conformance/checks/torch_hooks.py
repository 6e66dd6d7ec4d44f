"""PyTorch's own hooks, on the components of a bridge and on Hugging Face's modules in them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
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
from conformance.sites import behind_flags
from conformance.spec import Case
from conformance.strategies import cases, legal_flags, run_specs
from conformance.subjects import Subject, bridged, reference

INSIDE = ".original_component"

Seen = Mapping[str, list[tuple[torch.Tensor, ...]]]


def _halved(_module: nn.Module, _args: Any, output: Any) -> Any:
    """The output with its first tensor halved."""
    return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2


def _heard(
    subject: Subject,
    case: Case,
    modules: Mapping[str, nn.Module],
    edited: Iterable[str],
    backwards: Iterable[str],
) -> tuple[Observation, Seen, Seen]:
    """One forward with a hook on each module, and edits on some: what every call gave.

    An edit comes after what its own module shows. All hooks are taken off again.

    Args:
        subject: Whose modules.
        case: How to run it.
        modules: The modules by name.
        edited: Which outputs are halved.
        backwards: Which modules have a backward hook too; if none has, there is no backward.
    """
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in modules}
    sent: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in backwards}

    def keep(name: str) -> Any:
        def keeping(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            seen[name].append(tuple(tensor.detach().clone() for tensor in tensors))

        return keeping

    def keep_gradients(name: str) -> Any:
        def keeping(_module: nn.Module, _inputs: Any, gradients: Any) -> None:
            tensors = (gradient for gradient in gradients if gradient is not None)
            sent[name].append(tuple(tensor.detach().clone() for tensor in tensors))

        return keeping

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    handles += [modules[name].register_forward_hook(_halved) for name in edited]
    handles += [modules[name].register_full_backward_hook(keep_gradients(name)) for name in sent]
    with warnings.catch_warnings():
        # Said of a module none of whose inputs has a gradient.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        shown = observe(subject, case, backward=bool(sent))
    for handle in handles:
        handle.remove()
    return shown, seen, sent


def _bridge_modules(subject: Subject, every: list[Part]) -> dict[str, nn.Module]:
    """Components by their paths, and what they wrap; an attention bridge calls no module."""
    found: dict[str, nn.Module] = {}
    for part in every:
        component: Any = bridge_of(subject).get_submodule(part.path)
        found[part.path] = component
        if part.role is not AttentionBridge:
            found[part.path + INSIDE] = component.original_component
    return found


@check(
    "hook_api.torch",
    "PyTorch's own forward hooks on every component, and on the module it wraps (but attention's, "
    "which is not run), are called once a forward, under flags too, see what the same hooks see on "
    "Hugging Face's model, and what they return has the effect that it has there; full "
    "backward hooks, but under flags and where Hugging Face clamps in place, see its gradients.",
    lambda: cases(runs=lambda model: run_specs(model, flags=legal_flags())),
    examples=0.15,
)
def torch_hooks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The outputs of some are halved, on the bridge outside or inside of the component."""
    case, draw = in_one_forward(case), drawing(case)
    every = parts(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    flagged = bool(draw(3))
    if flagged:
        turn(subject, case.run.flags, True)
        for name in behind_flags(case.model, case.run.flags if case.run.token_seed % 4 else ()):
            bridge_of(subject).hook_dict[name].add_hook(lambda tensor, hook: None)
    modules = _bridge_modules(subject, every)
    edited = [name for name in modules if draw(3) == 0]
    truth = reference(case.model)
    there = {part.path: truth.model.get_submodule(part.module) for part in every}
    # Under a flag gradients are summed in another order.
    backwards = [] if flagged else [name for name in modules if not _clamped(name, truth)]
    plain = [name for name in there if name in backwards]
    halved = [_path(name) for name in edited]
    expected, due, due_back = _heard(truth, case, there, halved, plain)
    actual, got, got_back = _heard(subject, case, modules, edited, backwards)
    yield from _differing("hooks", due, got, [name for name in modules if name + INSIDE in edited])
    outside = [name for name in modules if name.endswith(INSIDE) and _path(name) in edited]
    yield from _differing("backward hooks", due_back, got_back, outside)
    yield from logits_gap(expected, actual, f"logits with halved outputs of {', '.join(edited)}")


def _path(name: str) -> str:
    return name.removesuffix(INSIDE)


def _differing(kind: str, due: Seen, got: Seen, edited: Collection[str]) -> Iterator[Gap]:
    """The gaps of what hooks were called with.

    Args:
        kind: Of the hooks.
        due: What the reference's modules gave, by path.
        got: What the components gave and what they wrap.
        edited: Those of them between which and what the reference gave an output is halved.
    """
    for name, calls in got.items():
        if len(calls) != len(due[_path(name)]):
            told = f"its PyTorch {kind} are called {len(calls)} times, not once"
            yield Gap(name, "contract", told)
    for name, calls in got.items():
        for wanted, tensors in zip(due[_path(name)], calls, strict=False):
            if name in edited:
                wanted = _halved(nn.Identity(), (), wanted)
            label = name if kind == "hooks" else f"{name}, gradient"
            yield from exact_gaps(_numbered(label, wanted), _numbered(label, tensors))


def _clamped(name: str, truth: Subject) -> bool:
    """Whether Hugging Face clamps a module's output in place, which backward hooks forbid."""
    return truth.clamps and _path(name).endswith((".q", ".k", ".v"))


def _numbered(name: str, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return {f"{name}, output {at}": tensor for at, tensor in enumerate(tensors)}
