"""Run a subject once and keep what is to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformers import DynamicCache

from conformance.edits import edited
from conformance.inputs import Inputs, derived_positions, inputs
from conformance.sites import Site, observable
from conformance.spec import Case
from conformance.subjects import Subject, at_work
from conformance.taps import TappedCache, Taps

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Observation:
    """What one run of one subject showed.

    Attributes:
        logits: ``[batch, pos, d_vocab]``, of all chunks.
        values: Each site's tensor in the hook's layout, after any edit of it, in the order of
            firing. A later chunk's sites are called ``name#chunk``.
        gradients: Each site's gradient of the probed logits, in the order of the backward pass.
            Only of a run in one chunk: a backward hook does not know which forward it is of.
        parameter_gradients: By Hugging Face's parameter names; None where there is none.
        fired: Every firing of a forward hook, in order, repetitions included.
        fired_backward: Every firing of a backward hook, in order.
    """

    logits: torch.Tensor
    values: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    parameter_gradients: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    fired: tuple[str, ...] = ()
    fired_backward: tuple[str, ...] = ()


class Recorder:
    """Collects what the sites show while a subject runs, and performs the run's edits there."""

    def __init__(self, case: Case) -> None:
        self.edits = {edit.site: edit for edit in case.run.edits}
        self.backward = case.run.chunks == 1
        self.chunk = 0
        self.values: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.fired: list[str] = []
        self.fired_backward: list[str] = []

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that the run's edit of a site leaves; the same object if there is none."""
        return edited(self.edits[name], tensor) if name in self.edits else tensor

    def value(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a site's tensor as it is now."""
        key = f"{name}#{self.chunk}" if self.chunk else name
        self.fired.append(key)
        self.values[key] = tensor.detach().clone()

    def gradient(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a site's gradient."""
        self.fired_backward.append(name)
        self.gradients[name] = tensor.detach().clone()

    def visit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Edit and keep a tensor of a tapped Hugging Face model (see `conformance.taps`)."""
        tensor = self.edit(name, tensor)
        self.value(name, tensor)
        if tensor.requires_grad and self.backward:
            tensor.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self.gradient(name, gradient)
            )
        return tensor


def _edit_hook(recorder: Recorder, name: str) -> Callable[..., torch.Tensor | None]:
    def hook(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
        new = recorder.edit(name, tensor)
        if recorder.edits[name].kind != "in_place":
            return new
        tensor.copy_(new)
        return None

    return hook


def _value_hook(recorder: Recorder, name: str) -> Callable[..., None]:
    def hook(tensor: torch.Tensor, hook: HookPoint) -> None:
        recorder.value(name, tensor)

    return hook


def _gradient_hook(recorder: Recorder, name: str) -> Callable[..., None]:
    def hook(tensor: torch.Tensor, hook: HookPoint) -> None:
        recorder.gradient(name, tensor)

    return hook


def hook_points(subject: Subject) -> dict[str, HookPoint]:
    """Every hook point of a bridge once, under its canonical name."""
    assert subject.bridge is not None
    unique = {id(point): point for point in subject.bridge.hook_dict.values()}
    return {str(point.name): point for point in unique.values()}


@contextmanager
def _hooked(subject: Subject, recorder: Recorder, backward: frozenset[str]) -> Iterator[None]:
    """Record, and edit, at every hook point of a bridge; backward only where asked."""
    points = hook_points(subject)
    try:
        for name, point in points.items():
            if name in recorder.edits:
                point.add_hook(_edit_hook(recorder, name))
            point.add_hook(_value_hook(recorder, name))
            if name in backward:
                point.add_hook(_gradient_hook(recorder, name), dir="bwd")
        yield
    finally:
        for point in points.values():
            point.remove_hooks("both")


def _call(subject: Subject, given: Mapping[str, Any]) -> torch.Tensor:
    """One forward: the logits ``[batch, pos, d_vocab]``."""
    if subject.bridge is None:
        logits: torch.Tensor = subject.model(**given).logits
        return logits
    rest = dict(given)
    tokens = rest.pop("input_ids")
    bridged: torch.Tensor = subject.bridge(tokens, return_type="logits", **rest)
    return bridged


def _chunks(subject: Subject, case: Case, data: Inputs) -> Iterator[dict[str, Any]]:
    """The keyword arguments of each successive forward."""
    run = case.run
    bounds = [run.seq_len * chunk // run.chunks for chunk in range(run.chunks + 1)]
    cache: DynamicCache | None = None
    if subject.bridge is None and run.use_cache:
        # A tap must see a key before the cache stores it: the cache changes its memory layout, and
        # so the rounding of what an edited key is multiplied with.
        cache = TappedCache(config=subject.model.config)
    elif run.chunks > 1:
        cache = DynamicCache(config=subject.model.config)
    for start, stop in pairwise(bounds):
        given: dict[str, Any] = {
            "input_ids": data.tokens[:, start:stop],
            "use_cache": run.use_cache,
        }
        positions = data.position_ids
        if data.attention_mask is not None:
            given["attention_mask"] = data.attention_mask[:, :stop]
            # A bridge derives its positions from the mask; the reference is told.
            if positions is None and subject.bridge is None:
                positions = derived_positions(data.attention_mask[:, :stop])
        if positions is not None:
            given["position_ids"] = positions[:, start:stop]
        if cache is not None:
            given["past_key_values"] = cache
        yield given


def run_forward(subject: Subject, case: Case, data: Inputs, recorder: Recorder) -> torch.Tensor:
    """All forwards of a run, from equal random states: the logits ``[batch, pos, d_vocab]``."""
    module = subject.bridge if subject.bridge is not None else subject.model
    module.train(case.run.training)
    pieces = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.run.token_seed)
        for recorder.chunk, given in enumerate(_chunks(subject, case, data)):
            pieces.append(_call(subject, given))
    return torch.cat(pieces, dim=1)


def observe(
    subject: Subject,
    case: Case,
    *,
    sites: Mapping[str, Site] | None = None,
    backward: bool = True,
    gradients_at: frozenset[str] | None = None,
    recorder: Recorder | None = None,
    data: Inputs | None = None,
) -> Observation:
    """Run a subject forwards, and backwards if asked, and keep what it showed.

    Args:
        subject: What to run.
        case: How to run it.
        sites: What to record of a Hugging Face model; a bridge shows every hook point it has.
            None records nothing: the bare model, with no hook of ours on it.
        backward: Send the probe back through the logits.
        gradients_at: Sites of a bridge to hook backwards; None hooks all of ``sites``.
        recorder: What keeps and edits, if not a plain one.
        data: What to feed; None draws it from the case.
    """
    data = data or inputs(case)
    recorder = recorder or Recorder(case)
    around: Any = nullcontext()
    if sites is not None and subject.bridge is not None:
        wanted = frozenset(sites) if gradients_at is None else gradients_at
        around = _hooked(
            subject, recorder, wanted if backward and recorder.backward else frozenset()
        )
    elif sites is not None:
        around = Taps(
            subject.model,
            sites,
            recorder.visit,
            d_head=case.model.d_head,
            clamps=subject.clamps,
            cached=case.run.use_cache,
        ).attached()
    blame = at_work("running") if subject.under_test else nullcontext()
    with blame, torch.set_grad_enabled(backward), around:
        logits = run_forward(subject, case, data, recorder)
        # A replaced output has no gradient to send back.
        if backward and logits.requires_grad:
            logits.backward(data.probe.to(logits.dtype))  # type: ignore[no-untyped-call]
    gradients: dict[str, torch.Tensor | None] = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in subject.parameters.items()
    }
    for parameter in subject.parameters.values():
        parameter.grad = None
    return Observation(
        logits.detach(),
        recorder.values,
        recorder.gradients,
        gradients if backward else {},
        tuple(recorder.fired),
        tuple(recorder.fired_backward),
    )


def sites_of(subject: Subject, case: Case) -> dict[str, Site]:
    """The sites that a subject's plain forward must fire."""
    return observable(case.model, subject.optional_hooks)
