"""The life of a patched model: twice, in trouble, bridged, without layers, and undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, needs_patch
from conformance.compare import Gap, bitwise
from conformance.observe import observe
from conformance.points import OnPurposeError
from conformance.spec import Case
from conformance.strategies import clipped_cases
from conformance.subjects import (
    Subject,
    at_work,
    bridged,
    make_adapter,
    patched,
    reference,
    unpatcher,
)


class TroubleInterrupt(KeyboardInterrupt):
    """What Ctrl-C raises in the middle of an attention, which is no `Exception`."""


def _plain(case: Case) -> Case:
    return replace(case, run=replace(case.run, chunks=1))


def _configurations(subject: Subject, case: Case) -> list[tuple[Any, Any]]:
    """What each attention's and the model's own configuration say of the clip, inside a forward."""
    seen: list[tuple[Any, Any]] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda *_, attention=layer.self_attn: seen.append(
                (attention.config.clip_qkv, subject.model.config.clip_qkv)
            )
        )
        for layer in subject.model.model.layers
    ]
    try:
        observe(subject, case, backward=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def left_over(subject: Subject, case: Case) -> Iterator[Gap]:
    """Outside of a forward every attention has the shared configuration, clip and all."""
    model = subject.model
    if model.config.clip_qkv != case.model.clip_qkv:
        yield Gap("config.clip_qkv", "contract", f"the shared one now says {model.config.clip_qkv}")
    for index, layer in enumerate(model.model.layers):
        if getattr(layer.self_attn, "config", None) is not model.config:
            yield Gap(f"layers.{index}.self_attn.config", "contract", "is not the shared one")


def _inner_gaps(subject: Subject, case: Case) -> Iterator[Gap]:
    """What Hugging Face's attentions inside of a bridge compute on their own."""
    truth, bridge = reference(case.model).model, bridge_of(subject)
    draw = torch.Generator().manual_seed(case.run.token_seed)
    x = torch.randn(1, 3, case.model.hidden_size, generator=draw, dtype=torch.float64)
    x = x.to(truth.dtype)
    rotation = truth.model.rotary_emb(x, torch.arange(3)[None])
    for index, layer in enumerate(truth.model.layers):
        inner = bridge.blocks[index].attn.original_component
        with torch.no_grad():
            due, _ = layer.self_attn(x, rotation, None)
            with at_work("an attention inside of a bridge"):
                got, _ = inner(x, rotation, None)
        yield from bitwise(f"blocks.{index}.attn's own attention, unpatched", due, got)


@check(
    "patch.life",
    "The patch hides the clip inside an attention's forward only, is the same twice as once, and "
    "leaves nothing over, also where a hook raises or is interrupted; unpatch_model undoes it, "
    "inside of a bridge too.",
    clipped_cases,
    examples=0.2,
)
def life(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Patched twice, looked into, troubled, run again, undone."""
    needs_patch(adapter)
    case = _plain(case)
    without = observe(reference(case.model.without_clip()), case, backward=False)
    subject = patched(case.model, adapter)
    with at_work("patching twice"):
        make_adapter(adapter, subject.model).prepare_model(subject.model)
    if any(seen != (None, case.model.clip_qkv) for seen in _configurations(subject, case)):
        told = "self_attn.config says None and model.config the clip"
        yield Gap("config.clip_qkv", "contract", f"inside of an attention not: {told}")
    yield from left_over(subject, case)

    trouble_is = (OnPurposeError, TroubleInterrupt)[drawing(case)(2)]

    def trouble(*_: object) -> None:
        raise trouble_is

    handle = subject.model.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(trouble)
    try:
        with at_work("a forward that a hook ends"), suppress(trouble_is):
            subject.model(torch.zeros((1, 1), dtype=torch.long))
    finally:
        handle.remove()
    yield from left_over(subject, case)
    yield from logits_gap(without, observe(subject, case, backward=False))

    undo = unpatcher(adapter)
    if undo is not None:
        with at_work("unpatch_model"):
            undo(subject.model)
        expected = observe(reference(case.model), case, backward=False)
        actual = observe(subject, case, backward=False)
        yield from logits_gap(expected, actual, "logits after unpatch_model")
        subject = bridged(case.model, adapter, prepared=True)
        with at_work("unpatch_model of a bridged model"):
            undo(subject.model)
        yield from _inner_gaps(subject, case)


@check(
    "patch.strange",
    "prepare_model of a bridged model leaves it exact, and of a clipping model without layers is a "
    "clear error.",
    clipped_cases,
    examples=0.1,
)
def strange(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """What is no plain `OlmoForCausalLM` is right, a no-op or an error, never half patched."""
    needs_patch(adapter)
    case = _plain(case)
    expected = observe(reference(case.model), case, backward=False)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    made = make_adapter(adapter, reference(case.model).model)
    with at_work("prepare_model of a bridged model"):
        made.prepare_model(subject.model)
    yield from logits_gap(expected, observe(subject, case, backward=False), "bridged logits")
    nothing = SimpleNamespace(config=SimpleNamespace(clip_qkv=case.model.clip_qkv))
    try:
        made.prepare_model(nothing)
    except Exception as error:
        if "layers" not in str(error):
            yield Gap("without layers", "contract", f"the error does not name them: {error}")
    else:
        yield Gap("without layers", "contract", "a clip that nothing could skip was let pass")
