"""Each component alone is its Hugging Face module, value and gradient, from equal inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import BlockBridge

from conformance.alone import Call, Drawer, run_alone, watched
from conformance.checks.attention_alone import Alone, by_position, without_embeddings
from conformance.checks.forked import is_exact
from conformance.checks.masks import hard_mask, soft_mask
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, exact_gaps, turn
from conformance.compare import Gap, labelled
from conformance.parts import Part, parameter, parts
from conformance.points import hook_points
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, hf_model, reference


@dataclass(frozen=True)
class Pair:
    """A reference and a bridge whose components are ready to be called alone."""

    truth: Subject
    subject: Subject
    case: Case
    points: Mapping[str, HookPoint]

    def module(self, part: Part) -> Any:
        """The Hugging Face module of a component."""
        return self.truth.model.get_submodule(part.module)

    def gaps(
        self,
        part: Part,
        calls: Sequence[Call],
        theirs: Sequence[Call] = (),
        *,
        cached: bool = False,
    ) -> Iterator[Gap]:
        """Call a component and its Hugging Face module, and compare all that comes of it.

        Args:
            part: Which.
            calls: The arguments.
            theirs: Those of the Hugging Face module, where they are not the same.
            cached: With a key-value cache.
        """
        bridge, seed = self.subject.bridge, self.case.run.token_seed
        assert bridge is not None
        module = self.module(part)
        known = dict(module.named_parameters())
        expected = run_alone(module, theirs or calls, known, seed=seed, cached=cached)
        own: dict[str, Any] = {
            name: parameter(dict(self.subject.parameters), f"{part.module}.{name}")
            for name in known
        }
        # Sites that are recomputed round the module's own output have checks of their own.
        points = {
            name: point
            for name, point in self.points.items()
            if name.startswith(f"{part.path}.")
            and not name.endswith((".hook_scale", ".hook_normalized"))
        }
        hooked = bool(seed & 1)
        with at_work(f"calling {part.path} alone"), watched(points) if hooked else nullcontext():
            actual = run_alone(
                bridge.get_submodule(part.path), calls, own, seed=seed, cached=cached
            )
        for gap in exact_gaps(expected, actual):
            kind = "gradient" if gap.site.startswith("gradient") else gap.kind
            yield replace(gap, site=f"{part.path} alone: {gap.site}", kind=kind)


def wired(adapter: Adapter, case: Case) -> Pair:
    """Build the two, with the bridge wired by the adapter's own ``setup_component_testing``."""
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    with at_work("setup_component_testing"):
        subject.bridge.adapter.setup_component_testing(hf_model(case.model), subject.bridge)
    for each in (truth.model, subject.bridge):
        each.train(case.run.training)
    return Pair(truth, subject, case, hook_points(subject))


def drawn_parts(case: Case) -> list[Part]:
    """The components of one drawn block, and those outside of the blocks."""
    block = case.run.token_seed % case.model.num_hidden_layers
    found = parts(case.model)
    return [p for p in found if not p.path.startswith("blocks.") or f"blocks.{block}" in p.path]


def _is_block(part: Part) -> bool:
    return part.role is BlockBridge


def _call(part: Part, module: Any, draw: Drawer) -> Call:
    """The arguments of a component that needs but one tensor, or a tensor and positions."""
    if part.path == "embed":
        return Call((draw.tokens(),))
    if part.path == "rotary_emb":
        return Call((draw.hidden(draw.model.hidden_size), draw.positions()))
    linear = isinstance(module, nn.Linear)
    return Call((draw.hidden(module.in_features if linear else draw.model.hidden_size),))


@check(
    "components.alone",
    "Each component alone, wired by setup_component_testing, on random inputs, gives the value of "
    "its Hugging Face module and the gradient of every input and parameter, in every dtype.",
    cases,
    examples=0.5,
)
def alone(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """All but attention and block, which need more than a tensor; half of the cases with hooks."""
    pair, draw = wired(adapter, case), Drawer(case)
    for part in drawn_parts(case):
        if not part.path.endswith(".attn") and not _is_block(part):
            yield from pair.gaps(part, [_call(part, pair.module(part), draw)])


def _calls(pair: Pair, draw: Drawer, *masks: torch.Tensor | None) -> list[list[Call]]:
    """The calls of an attention or block, one for each chunk: under each of the masks."""
    run, hidden, positions = draw.run, draw.hidden(draw.model.hidden_size), draw.positions()
    with torch.no_grad():
        cos, sin = pair.truth.model.model.rotary_emb(hidden, positions)
    bounds = [run.seq_len * chunk // run.chunks for chunk in range(run.chunks + 1)]

    def call(mask: torch.Tensor | None, start: int, stop: int) -> Call:
        rows = slice(start, stop)
        given = {
            "hidden_states": hidden[:, rows],
            "attention_mask": None if mask is None else mask[:, :, rows, :stop],
            "position_ids": positions[:, rows],
            "position_embeddings": (cos[:, rows], sin[:, rows]),
        }
        return Call(kwargs=given)

    return [[call(mask, *rows) for rows in pairwise(bounds)] for mask in masks]


def _added(case: Case, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What may be added to scores to mask them: every other time it has biases for each head."""
    if drawing(case)(2):
        return hard_mask(seen, dtype)
    return soft_mask(seen, case.model.num_attention_heads, dtype, case.run.token_seed)


@check(
    "components.attention",
    "An attention alone gives the output, pattern, cached keys and values and gradients of its "
    "Hugging Face module, in every dtype, in chunks over a cache, with dropout in training, under "
    "an additive mask, soft or not, or a boolean one, and causally without one; called by position "
    "too, without cosines and sines, and under flags that show what each head reads.",
    cases,
    examples=0.5,
)
def attention(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Each kind of mask in turn; Hugging Face's module gets what it means, additive."""
    pair, draw = wired(adapter, case), Drawer(case)
    (part,) = (part for part in drawn_parts(case) if part.path.endswith(".attn"))
    seen = draw.seen()
    drawn, causal = (hard_mask(each, draw.dtype) for each in (seen, torch.ones_like(seen).tril()))
    added = _added(case, seen, draw.dtype)
    calls = _calls(pair, draw, drawn, seen, causal, None, added)
    for kind, (ours, theirs) in {
        "an additive mask": (calls[4], calls[4]),
        "a boolean mask": (calls[1], calls[0]),
        "no mask": (calls[3], calls[2]),
    }.items():
        for gap in pair.gaps(part, ours, theirs, cached=case.run.use_cache):
            yield replace(gap, site=f"{gap.site}, {kind}")
    if is_exact(adapter):  # upstream's takes keywords alone, and leaves out what it is not given
        yield from _called_otherwise(pair, part, calls[0])


def _called_otherwise(pair: Pair, part: Part, calls: Sequence[Call]) -> Iterator[Gap]:
    """In one of three ways what no layer does: what comes of it is the same."""
    case, choose = pair.case, drawing(pair.case)
    way, told = choose(3), len(calls) > 1 or bool(choose(2))
    if way == 0:
        placed = [by_position(call) for call in calls]
        yield from labelled("by position", pair.gaps(part, placed, cached=case.run.use_cache))
    elif way == 1:
        rotary = pair.truth.model.model.rotary_emb
        with torch.no_grad():
            pairs = [without_embeddings(call, rotary, told=told) for call in calls]
            ours, theirs = zip(*pairs, strict=True)
            gaps = list(pair.gaps(part, ours, theirs, cached=True))
        yield from labelled("without embeddings", gaps)
    else:
        flag = ("use_split_qkv_input", "use_attn_in")[choose(2)]
        turn(pair.subject, [flag], True)
        component = bridge_of(pair.subject).get_submodule(part.path)
        alone = Alone(component, pair.module(part), pair.points, part.path, calls[0])
        yield from alone.gaps(flag, choose)


@check(
    "components.block",
    "A block alone gives the output, cached keys and values and gradients of its Hugging Face "
    "module, in every dtype, in chunks over a cache, with dropout in training.",
    cases,
    examples=0.3,
)
def block(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Called as a model calls it, by keywords."""
    pair, draw = wired(adapter, case), Drawer(case)
    (calls,) = _calls(pair, draw, _added(case, draw.seen(), draw.dtype))
    (part,) = (part for part in drawn_parts(case) if _is_block(part))
    yield from pair.gaps(part, calls, cached=case.run.use_cache)
