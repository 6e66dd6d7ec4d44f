"""Hooks that are on a bridge when it is copied: on the copy they are its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    bridge_of,
    copied,
    drawing,
    forward_as_it_is,
    in_one_forward,
    sites_to_hook,
)
from conformance.compare import Gap, bitwise, compare_firing, labelled
from conformance.points import hook_points
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged

NAMES = ["one name", "another"]


def _add_uncommon(point: HookPoint) -> list[str]:
    """Put on a hook that goes by two names, and one that PyTorch's own handle takes off again.

    Returns:
        Where both write down what they are called by.
    """
    heard: list[str] = []

    def hear(tensor: torch.Tensor, hook: HookPoint) -> None:
        heard.append(str(hook.name))

    if "alias_names" in inspect.signature(point.add_hook).parameters:
        point.add_hook(hear, alias_names=NAMES)
    else:
        for name in NAMES:
            point.add_hook(lambda tensor, hook, name=name: heard.append(name))
    point.add_hook(hear)
    point.fwd_hooks[-1].hook.remove()
    return heard


def _calls(subject: Subject) -> int:
    """What the hooks of `hooked` have counted in ``hook.ctx``."""
    return sum(point.ctx.get("calls", 0) for point in hook_points(subject).values())


@check(
    "copies.hooked",
    "Hooks that are on a bridge when it is copied by copy.deepcopy are on the copy as well, where "
    "they fire and change what they do on the original, and on a copy of that; they come off each "
    "alone, go by the same names, and what they keep in hook.ctx is kept by each alone.",
    cases,
    examples=0.2,
)
def hooked(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A hook at every site, forwards and backwards; at one of them two that change the tensor."""
    case, draw = in_one_forward(case), drawing(case)
    original = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, sites = bridge_of(original), sites_to_hook(original, case)
    bare, _ = forward_as_it_is(original, case)
    edited = f"blocks.{draw(case.model.num_hidden_layers)}.hook_out"
    fired: list[str] = []
    permanent: dict[str, bool] = {}

    def put(name: str, way: str, change: Callable[[Any], Any], lasting: bool) -> None:
        label = f"{name}, {way} {len(permanent)}"
        permanent[label] = lasting

        def hook(tensor: torch.Tensor, hook: HookPoint) -> Any:
            fired.append(label)
            hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1
            return change(tensor)

        bridge.add_hook(name, hook, dir=way, is_permanent=lasting)

    lasting = bool(draw(2))
    looked: list[bool] = []
    raw = [part for part in original.model.modules() if type(part).__module__.startswith("torch.")]
    raw = [part for part in raw if isinstance(part, torch.nn.Linear)]
    raw[draw(len(raw))].register_forward_hook(lambda *_: looked.append(True))
    with at_work("adding hooks"):
        for name in sites:
            put(name, "fwd", lambda tensor: None, bool(draw(2)))
            put(name, "bwd", lambda gradient: None, bool(draw(2)))
        put(edited, "fwd", lambda tensor: -tensor, lasting)
        put(edited, "fwd", lambda tensor: tensor + 1, lasting)
        heard = _add_uncommon(hook_points(original)[edited])

    def shown(subject: Subject) -> tuple[torch.Tensor, list[str]]:
        fired.clear()
        looked.clear()
        heard.clear()
        logits, _ = forward_as_it_is(subject, case)
        with at_work("a backward"):
            logits.sum().backward()  # type: ignore[no-untyped-call]
        for parameter in subject.parameters.values():
            parameter.grad = None
        return logits.detach(), list(fired)

    logits, order = shown(original)
    subjects = {"the original": original, "a copy": (twin := copied(original))}
    subjects["a copy of that"] = copied(twin)
    left = dict.fromkeys(subjects, (logits, order))
    some = logits if lasting else bare.detach(), [label for label in order if permanent[label]]
    none: tuple[torch.Tensor, list[str]] = bare.detach(), []
    for freed, wholly in (
        ("", False),
        ("a copy", False),
        ("the original", False),
        ("a copy", True),
        ("a copy of that", True),
        ("the original", True),
    ):
        if freed:
            with at_work(f"taking hooks off {freed}"):
                bridge_of(subjects[freed]).reset_hooks(including_permanent=wholly)
            left[freed] = none if wholly else some
        for name, subject in subjects.items():
            before = {other: _calls(each) for other, each in subjects.items()}
            (due, wanted), (got, met) = left[name], shown(subject)
            label = f"{name}, hooks last taken off {freed or 'nothing'}"
            for other, each in subjects.items():
                more = _calls(each) - before[other]
                if more != (len(met) if other == name else 0):
                    told = f"hook.ctx of {other} has heard of {more} calls, {len(met)} were made"
                    yield Gap(f"{label}: hook.ctx", "contract", told)
            yield from labelled(label, compare_firing(wanted, met))
            yield from labelled(label, bitwise("logits", due, got))
            names = NAMES if left[name][1] is order else []
            yield from labelled(f"{label}: a hook of two names", compare_firing(names, heard))
            if len(looked) != 1:
                yield Gap(label, "count", f"a plain PyTorch hook fired {len(looked)} times")
