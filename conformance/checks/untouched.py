"""What an adapter does to a model is what it says: all else of it stays as it was."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.activations import ACT2FN
from transformers.models.olmo import modeling_olmo

from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, has_exact
from conformance.compare import Gap
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import at_work, hf_model, make_adapter

_IMPLEMENTATION = ("_attn_implementation", "attn_implementation")  # that one is asked to change
# Whose code may run in Hugging Face's OLMo.
_HOMES = tuple(str(Path(package.__file__ or "").parent) for package in (torch, transformers))
_ACTIVATIONS = {name: dict.get(ACT2FN, name) for name in ACT2FN}  # before any adapter is made


def _look(module: nn.Module, *_: object) -> None:
    """A hook of a user."""


def _process() -> dict[str, object]:
    """What all models of a process share."""
    return {
        "PyTorch's random state": torch.get_rng_state().tolist(),
        "PyTorch's default dtype": torch.get_default_dtype(),
        "whether gradients are on": torch.is_grad_enabled(),
        "whether PyTorch detects anomalies": torch.is_anomaly_enabled(),
        "whether PyTorch is deterministic": torch.are_deterministic_algorithms_enabled(),
        "PyTorch's precision of products": torch.get_float32_matmul_precision(),
        "PyTorch's threads": torch.get_num_threads(),
        "filters of warnings": list(warnings.filters),
    }


def _foreign() -> Iterator[Gap]:
    """What of Hugging Face's OLMo is somebody else's code.

    Asked for where the code is, and not whether it has changed since: a patch of the library is
    there from the first bridge of a process on, and the reference runs it too.
    """
    classes = [each for each in vars(modeling_olmo).values() if inspect.isclass(each)]
    own = [each for each in classes if each.__module__ == modeling_olmo.__name__]
    owners: list[Any] = [modeling_olmo, *own]
    for owner in owners:
        for name, found in vars(owner).items():
            held = getattr(found, "__func__", found)  # of a class or static method
            if not isinstance(held, FunctionType):
                continue
            if not held.__code__.co_filename.startswith(_HOMES):
                told = f"is a function of {held.__code__.co_filename}"
                yield Gap(f"{owner.__name__}.{name}", "contract", told)
    for name, activation in _ACTIVATIONS.items():
        if dict.get(ACT2FN, name) is not activation:
            yield Gap(f"ACT2FN[{name}]", "contract", f"is {dict.get(ACT2FN, name)!r}")


@dataclass(frozen=True)
class _Model:
    """A Hugging Face model with a past, and its parts: bridging renames and wraps them.

    Attributes:
        whole: The model.
        modules: Its own modules, by their names.
        parameters: Its own parameters, by their names.
        hooked: Which module has a forward hook and a full backward hook of a user.
    """

    whole: Any
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    hooked: nn.Module

    def standing(self) -> dict[str, Any]:
        """All that nobody asks an adapter to change."""
        hooks = (self.hooked._forward_hooks, self.hooked._backward_hooks)
        configuration = self.whole.config.to_dict()
        told = {n: repr(v) for n, v in configuration.items() if n not in _IMPLEMENTATION}
        generation = self.whole.generation_config.to_dict()
        return {
            **{f"{name or 'model'}.training": m.training for name, m in self.modules.items()},
            **{f"{name}.requires_grad": p.requires_grad for name, p in self.parameters.items()},
            **{f"{name}.grad": id(p.grad) for name, p in self.parameters.items()},
            **{f"{name}.dtype": p.dtype for name, p in self.parameters.items()},
            **{f"config.{name}": value for name, value in told.items()},
            **{f"generation_config.{n}": repr(v) for n, v in generation.items()},
            "hooks of the user": [sum(h is _look for h in each.values()) for each in hooks],
            **_process(),
        }


def _with_a_past(case: Case) -> _Model:
    """A model that has been trained and looked into: partly frozen, with gradients and hooks."""
    draw, whole = drawing(case), hf_model(case.model)
    modules, parameters = dict(whole.named_modules()), dict(whole.named_parameters())
    whole.train(case.run.training)
    for parameter in parameters.values():
        parameter.requires_grad_(bool(draw(3)))
        if parameter.requires_grad and draw(2):
            parameter.grad = torch.ones_like(parameter)
    linears = [module for module in modules.values() if isinstance(module, nn.Linear)]
    hooked = linears[draw(len(linears))]
    hooked.register_forward_hook(_look)
    hooked.register_full_backward_hook(_look)
    whole.config.use_cache = bool(draw(2))
    whole.generation_config.use_cache = bool(draw(2))
    return _Model(whole, modules, parameters, hooked)


@check(
    "surface.untouched",
    "prepare_model in either mode, a bridge that is built, by the package's bridge() too, and "
    "setup_component_testing leave a model's mode, what of it is trained, its gradients, "
    "configurations and hooks, PyTorch's random state and settings, the filters of warnings, and "
    "transformers' own code, as they were.",
    cases,
    examples=0.25,
)
def untouched(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One after the other, on one model; the package's ``bridge()`` on another one."""
    model, other = _with_a_past(case), _with_a_past(case)
    made: Any = make_adapter(adapter, model.whole)
    built: list[Any] = []
    acts: list[tuple[str, _Model, Callable[[], object]]] = [
        ("prepare_model", model, lambda: made.prepare_model(model.whole)),
        (
            "TransformerBridge(...)",
            model,
            lambda: built.append(TransformerBridge(model.whole, made, None)),
        ),
        (
            "setup_component_testing",
            model,
            lambda: made.setup_component_testing(model.whole, bridge_model=built[0]),
        ),
    ]
    if has_exact(adapter):
        exactly = lambda: made.prepare_model(model.whole, exact_clip=True)  # noqa: E731
        acts.insert(case.run.token_seed % 2, ("prepare_model(exact_clip=True)", model, exactly))
    package: ModuleType = sys.modules[adapter.__module__.partition(".")[0]]
    if callable(getattr(package, "bridge", None)):
        acts.append(("bridge(hf_model)", other, lambda: package.bridge(other.whole)))
    for name, touched, act in acts:
        before = touched.standing()
        with at_work(name):
            act()
        after = touched.standing()
        for thing, was in before.items():
            if after.get(thing) != was:
                told = f"{after.get(thing)!r:.60} instead of {was!r:.60}"
                yield Gap(thing, "contract", f"after {name}: {told}")
    yield from _foreign()
    if built[0].training != model.whole.training:
        told = f"begins in the mode training={built[0].training}, and its model was not in that"
        yield Gap("TransformerBridge(...).training", "contract", told)
