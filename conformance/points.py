"""The hook points of a bridge; put a recorder's hooks on them, and take them off again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from conformance.recorder import Recorder
from conformance.subjects import Subject
from conformance.taps import unturned


class OnPurposeError(Exception):
    """What a hook of ours raises where one that fails is wanted: no error of a subject's."""


def _value_hook(
    recorder: Recorder, name: str, returned: bool
) -> Callable[..., torch.Tensor | None]:
    def hook(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
        edit, new = recorder.edits.get(name), None
        if edit is not None:
            new = recorder.edit(name, tensor)
            if edit.kind == "in_place":
                tensor.copy_(new)
                new = None
        if returned and tensor.requires_grad and recorder.backward:
            new = tensor[...] if new is None else new
            recorder.differentiable[name] = new, unturned
        elif recorder.asking:
            recorder.differentiate(name, tensor if new is None else new, unturned)
        recorder.value(name, recorder.kept(tensor if new is None else new))
        return new

    return hook


def _gradient_hook(recorder: Recorder, name: str) -> Callable[..., Any]:
    def hook(tensor: torch.Tensor, hook: HookPoint) -> Any:
        new = recorder.gradient(name, tensor.detach().clone())
        if new is None or name not in recorder.overwrites:
            return (new,) if new is not None and recorder.wraps else new
        (tensor.data if recorder.unnoticed else tensor).copy_(new)
        return tensor if recorder.overwrites[name] else None

    return hook


def hook_points(subject: Subject) -> dict[str, HookPoint]:
    """Every hook point of a bridge once, under its canonical name."""
    assert subject.bridge is not None
    return canonical_points(subject.bridge)


def canonical_points(
    bridge: TransformerBridge, known: Collection[str] = ()
) -> dict[str, HookPoint]:
    """As `hook_points`, of a bridge that is no subject.

    Args:
        bridge: The bridge.
        known: Canonical names. In compatibility mode a hook point's own name is a legacy one.
    """
    by_name = bridge.hook_dict
    unique = {id(point): point for point in by_name.values()}
    canonical = {id(by_name[name]): name for name in known if name in by_name}

    def name_of(point: HookPoint) -> str:
        own = str(point.name)
        return own if own in known else canonical.get(id(point), own)

    return {name_of(point): point for point in unique.values()}


def attach(
    point: HookPoint, hook: Callable[..., torch.Tensor | None], way: Literal["fwd", "bwd"] = "fwd"
) -> Callable[[], None]:
    """Add a hook to a point; what is returned removes it, and leaves all others alone."""
    held = f"{way}_hooks"
    before = {id(handle) for handle in getattr(point, held)}
    point.add_hook(hook, dir=way)
    added = [handle for handle in getattr(point, held) if id(handle) not in before]

    def detach() -> None:
        for handle in added:
            handle.hook.remove()
        now = getattr(point, held)
        setattr(point, held, [handle for handle in now if handle not in added])

    return detach


@contextmanager
def hooked(
    subject: Subject,
    recorder: Recorder,
    known: Collection[str],
    backward: Collection[str],
    returned: bool,
) -> Iterator[None]:
    """Record, and edit, at every hook point of a bridge; backward only where asked."""
    assert subject.bridge is not None
    with ExitStack() as stack:
        for name, point in canonical_points(subject.bridge, known).items():
            returns = returned and name in known
            stack.callback(attach(point, _value_hook(recorder, name, returns)))
            if name in backward:
                stack.callback(attach(point, _gradient_hook(recorder, name), "bwd"))
        yield
