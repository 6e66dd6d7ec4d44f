"""Parts of a model that are not trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from conformance.checks.modes import DROPS, checkpoint
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, in_one_forward, sites_to_hook
from conformance.compare import Gap, compare_gradients, compare_parameters, labelled
from conformance.edits import edited
from conformance.observe import module_of, observe
from conformance.recorder import Observation, Recorder
from conformance.sites import Site
from conformance.spec import Case, Edit
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference

# Ways to freeze: the four parts, all but one weight, all but an attention, all but an addition of
# low rank, and all but what a hook adds. The last two are the usual ones.
WAYS = (0, 1, 2, 3, 4, 5, 6, 6, 7, 7)


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


class _Steering(Recorder):
    """Adds something trained to the tensor at one site, as steering and dictionaries do it.

    It has the shape of the whole tensor. The gradient of a vector is a sum, whose order would be
    for the memory's layout to say.

    Args:
        site: Where.
        parameters: What is trained of the subject; the addition joins it once its shape is known.
    """

    def __init__(self, site: str, parameters: dict[str, nn.Parameter]) -> None:
        self._site, self._parameters = site, parameters

    def begin(self, case: Case) -> None:
        """Edit the one site."""
        super().begin(case)
        self.edits = {self._site: Edit(site=self._site, kind="noise", seed=case.run.token_seed)}

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with the addition, which is noise, if it is the site's."""
        if name not in self.edits:
            return tensor
        noise = edited(self.edits[name], torch.zeros_like(tensor))
        self._parameters["added"] = nn.Parameter(noise)
        return tensor + self._parameters["added"]


def _way(case: Case) -> int:
    return WAYS[case.run.token_seed % len(WAYS)]


def _turns_alone(case: Case) -> bool:
    """Whether a trained addition goes to cosines or sines, which one head of one row reads."""
    return case.model.num_attention_heads == 1 and case.run.token_seed % 3 < 2


def _hooked(subject: Subject, case: Case, sites: Mapping[str, Site]) -> Observation:
    """What a subject shows with everything hooked, and maybe with something trained at a site."""
    if _way(case) < 7 and case.run.token_seed // len(WAYS) % 2:
        return observe(subject, case, sites=sites)
    turns = [name for name in sites if name.endswith(("attn.hook_cos", "attn.hook_sin"))]
    # Else not cosines and sines: their gradients are sums too, over rows and heads.
    none = ("embed.hook_in", "rotary_emb.hook_in", "hook_cos", "hook_sin")
    others = [name for name in sites if not name.endswith(none)]
    names = turns if _turns_alone(case) else others
    site = names[drawing(case)(len(names))]
    parameters = dict(subject.parameters)
    adding = _Steering(site, parameters)
    return observe(replace(subject, parameters=parameters), case, sites=sites, recorder=adding)


def freeze(subject: Subject, case: Case) -> Subject:
    """Freeze what the case's seed says; the subject with what is trained beside its weights."""
    way = _way(case)
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
    elif way == 6:
        added = _LowRank(subject, case).parameters
        return replace(subject, parameters={**subject.parameters, **added})
    return subject


@check(
    "training.frozen",
    "With requires_grad_(False) on parts, on all but a low-rank addition, or on all but what a "
    "hook adds, the gradients that remain, at the hooks too, and that of what a hook adds, are the "
    "reference's, under checkpointing as well, and there is no other.",
    lambda: cases(models=model_specs(dropouts=DROPS)),
    examples=0.35,
)
def frozen(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """By the bridge's own handles, then bare and with everything hooked."""
    case = in_one_forward(case, **({"batch": 1} if _turns_alone(case) else {}))
    checkpointed = case.run.training and case.run.positions == "derived"
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    with at_work("freezing"):
        subject = freeze(subject, case)
    truth = freeze(truth, case)
    bare = observe(truth, case)
    yield from labelled("bare", compare_parameters(bare, observe(subject, case)))
    sites = sites_to_hook(subject, case)
    expected, actual = _hooked(truth, case, sites), _hooked(subject, case, sites)
    yield from compare_gradients(expected, actual, sites)
    yield from compare_parameters(expected, actual)
    if checkpointed:
        for each in (truth, subject):
            checkpoint(each, case)
        expected, actual = observe(truth, case), observe(subject, case)
        yield from labelled("checkpointed", compare_parameters(expected, actual))
