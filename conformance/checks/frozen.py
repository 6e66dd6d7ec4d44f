"""Parts of a model that are not trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from conformance.checks.modes import DROPS, checkpoint
from conformance.checks.registry import Adapter, check
from conformance.checks.support import in_one_forward, sites_to_hook
from conformance.compare import Gap, compare_gradients, compare_parameters, labelled
from conformance.observe import module_of, observe
from conformance.spec import Case
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference


def parts_of(subject: Subject) -> list[nn.Module]:
    """What one may want to freeze, by its own handles: the same of every subject."""
    if subject.bridge is None:
        inner = subject.model.model
        layer: Any = inner.layers[-1]
        return [inner.embed_tokens, layer.self_attn, layer.mlp, subject.model.lm_head]
    block = subject.bridge.blocks[-1]
    return [subject.bridge.embed, block.attn, block.mlp, subject.bridge.unembed]


class _LowRank:
    """A trained addition of low rank to frozen projections, as LoRA makes one by a forward hook."""

    def __init__(self, subject: Subject, case: Case) -> None:
        draw = torch.Generator().manual_seed(case.run.token_seed)
        self.parameters: dict[str, nn.Parameter] = {}
        for block in range(case.model.num_hidden_layers):
            for letter in "qv":
                self._add(f"{block}.{letter}", _projection(subject, block, letter), draw)

    def _add(self, name: str, linear: Any, draw: torch.Generator) -> None:
        out, into = linear.weight.shape
        shapes = {"down": (1, into), "up": (out, 1)}
        for half, shape in shapes.items():
            drawn = torch.randn(shape, generator=draw).to(linear.weight.dtype)
            self.parameters[f"{name}.{half}"] = nn.Parameter(drawn)
        down, up = (self.parameters[f"{name}.{half}"] for half in shapes)
        linear.register_forward_hook(lambda _, args, out: out + args[0] @ down.T @ up.T)


def _projection(subject: Subject, block: int, letter: str) -> nn.Module:
    """The Hugging Face projection of a subject, bridged away or not."""
    if subject.bridge is not None:
        bridge: Any = getattr(subject.bridge.blocks[block].attn, letter)
        inside: nn.Module = bridge.original_component
        return inside
    found: nn.Module = getattr(subject.model.model.layers[block].self_attn, f"{letter}_proj")
    return found


def freeze(subject: Subject, case: Case) -> Subject:
    """Freeze what the case's seed says; the subject with what is trained beside its weights."""
    way = case.run.token_seed % 7
    parts = parts_of(subject)
    if way < len(parts):
        parts[way].requires_grad_(False)
        return subject
    module_of(subject).requires_grad_(False)
    if way == 4:  # all but one
        names = list(subject.parameters)
        subject.parameters[names[case.run.token_seed % len(names)]].requires_grad_(True)
    elif way == 5:  # all but an attention
        parts[1].requires_grad_(True)
    else:
        added = _LowRank(subject, case).parameters
        return replace(subject, parameters={**subject.parameters, **added})
    return subject


@check(
    "training.frozen",
    "With requires_grad_(False) on parts, or on all but a low-rank addition, the gradients that "
    "remain, at the hooks too, are the reference's, under checkpointing as well, and there is no "
    "other.",
    lambda: cases(models=model_specs(dropouts=DROPS)),
    examples=0.35,
)
def frozen(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """By the bridge's own handles, then bare and with everything hooked."""
    case = in_one_forward(case)
    checkpointed = case.run.training and case.run.positions == "derived"
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    with at_work("freezing"):
        subject = freeze(subject, case)
    truth = freeze(truth, case)
    bare = observe(truth, case)
    yield from labelled("bare", compare_parameters(bare, observe(subject, case)))
    sites = sites_to_hook(subject, case)
    expected, actual = observe(truth, case, sites=sites), observe(subject, case, sites=sites)
    yield from compare_gradients(expected, actual, sites)
    yield from compare_parameters(expected, actual)
    if checkpointed:
        for each in (truth, subject):
            checkpoint(each, case)
        expected, actual = observe(truth, case), observe(subject, case)
        yield from labelled("checkpointed", compare_parameters(expected, actual))
