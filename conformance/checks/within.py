"""What a hook can do in the midst of an attention: run its model, copy it, change settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from conformance.checks.forward import logits_gap
from conformance.compare import Gap
from conformance.observe import observe
from conformance.points import OnPurposeError
from conformance.recorder import Observation
from conformance.spec import Case
from conformance.subjects import Subject

# Does something inside of the last attention of a patched model, whose run is to be the one given.
Event = Callable[[Subject, Case, Observation], Iterator[Gap]]


@contextmanager
def _within(subject: Subject, place: str, act: Callable[[Any], None]) -> Iterator[Any]:
    """Do something once, in the last attention of the next run, before one of its projections."""
    attention: Any = subject.model.model.layers[-1].self_attn

    def once(*_: object) -> None:
        handle.remove()
        with torch.random.fork_rng(devices=[]):
            act(attention)

    handle = getattr(attention, f"{place}_proj").register_forward_pre_hook(once)
    try:
        yield attention
    finally:
        handle.remove()


def _run(subject: Subject, case: Case) -> Observation:
    return observe(subject, case, backward=False)


def _ended(subject: Subject, case: Case, expected: Observation) -> Iterator[Gap]:
    """The forward fails."""

    def act(attention: Any) -> None:
        raise OnPurposeError

    with _within(subject, "o", act), suppress(OnPurposeError):
        subject.model(torch.zeros((1, 1), dtype=torch.long))
    yield from ()


def _run_again(subject: Subject, case: Case, expected: Observation) -> Iterator[Gap]:
    """The model runs once more."""
    inner: list[Observation] = []
    with _within(subject, "q", lambda attention: inner.append(_run(subject, case))):
        outer = _run(subject, case)
    yield from logits_gap(expected, outer, "logits around a run")
    yield from logits_gap(expected, inner[0], "logits of a run within")


def _copied(subject: Subject, case: Case, expected: Observation) -> Iterator[Gap]:
    """The model is copied; the copy is patched as the original, and nobody is inside of it."""
    made: list[Any] = []
    with _within(subject, "v", lambda attention: made.append(copy.deepcopy(subject.model))):
        outer = _run(subject, case)
    yield from logits_gap(expected, outer, "logits around a copying")
    (model,) = made
    attention = model.model.layers[-1].self_attn
    if attention.config is not model.config:
        yield Gap("a copy made within: self_attn.config", "contract", "is not the shared one")
    for letter in "qkv":
        name = f"{letter}_proj"
        if getattr(attention, name) is not attention.get_submodule(name):
            yield Gap(f"a copy made within: {name}", "contract", "is not the module of that name")
    twin = replace(subject, model=model, parameters=dict(model.named_parameters()))
    yield from logits_gap(expected, _run(twin, case), "logits of a copy made within")


def _written(subject: Subject, case: Case, expected: Observation) -> Iterator[Gap]:
    """A setting is written to the attention's configuration, which is the shared one."""
    config: Any = subject.model.config
    with _within(subject, "q", lambda attention: setattr(attention.config, "told", 1)):
        outer = _run(subject, case)
    yield from logits_gap(expected, outer, "logits around a write")
    if vars(config).pop("told", None) != 1:
        yield Gap("self_attn.config.told", "contract", "written within a forward, and lost")


def _replaced(subject: Subject, case: Case, expected: Observation) -> Iterator[Gap]:
    """The attention, behind its clamp, is given another configuration, which stays."""
    other = copy.deepcopy(subject.model.config)
    with _within(subject, "o", lambda attention: setattr(attention, "config", other)) as attention:
        outer = _run(subject, case)
    yield from logits_gap(expected, outer, "logits around a change of configuration")
    if attention.config is not other:
        yield Gap("self_attn.config", "contract", "replaced within a forward, and back afterwards")
    attention.config = subject.model.config


EVENTS: tuple[Event, ...] = (_ended, _run_again, _copied, _written, _replaced)
