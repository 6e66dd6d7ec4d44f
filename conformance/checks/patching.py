"""The patch without a clip, in other modes, in other threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from conformance.checks.forward import logits_gap
from conformance.checks.patch import left_over
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, exact_gaps, has_exact, needs_patch
from conformance.checks.within import EVENTS
from conformance.compare import Gap, labelled
from conformance.inputs import inputs
from conformance.observe import observe
from conformance.spec import Case
from conformance.strategies import cases, clipped_cases, model_specs
from conformance.subjects import (
    Subject,
    at_work,
    hf_model,
    make_adapter,
    patched,
    reference,
    unpatcher,
)

THREADS = 4
PATIENCE = 20.0  # seconds that a thread waits for another, before a check is given up


def _attributes(model: Any) -> dict[str, Any]:
    """What every module of a model holds itself, by path, but for what lies inside of a dict."""
    return {
        f"{path}.{name}": held
        for path, module in model.named_modules()
        for name, held in vars(module).items()
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is another object than before, or there on one side only."""
    absent = object()
    names = before | after
    return sorted(n for n in names if before.get(n, absent) is not after.get(n, absent))


def unclipped_cases() -> SearchStrategy[Case]:
    """Cases whose model has no clip."""
    return cases(models=model_specs(clips=st.just(None)))


@check(
    "patch.no_clip",
    "Without a clip prepare_model is a no-op in either mode, and on whatever has no clip at all.",
    unclipped_cases,
    examples=0.1,
)
def no_clip(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Nothing that a module of the model holds is another object than before."""
    needs_patch(adapter)
    case = replace(case, run=replace(case.run, chunks=1))
    model = hf_model(case.model)
    made: Any = make_adapter(adapter, model)
    modes: list[dict[str, bool]] = [{}, *([{"exact_clip": True}] if has_exact(adapter) else [])]
    before = _attributes(model)
    things = {
        "the model": model,
        "None": None,
        "an object": object(),
        "a module": nn.Linear(2, 2),
        "what has no config": SimpleNamespace(config=None),
        "what has no clip": SimpleNamespace(config=SimpleNamespace(clip_qkv=None)),
    }
    for name, thing in things.items():
        for mode in modes:
            try:
                made.prepare_model(thing, **mode)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                yield Gap(f"prepare_model({mode or ''}) of {name}", "contract", told)
    for name in changed(before, _attributes(model)):
        yield Gap(name, "contract", "was changed, though there is no clip")
    subject = Subject(model, dict(model.named_parameters()))
    expected = observe(reference(case.model), case, backward=False)
    yield from logits_gap(expected, observe(subject, case, backward=False))


def _wrapped(attention: Any) -> Any:
    """What somebody else, who wraps forwards, has put before an attention's."""
    attention.forward = partial(attention.forward)
    return attention.forward


@check(
    "patch.modes",
    "However often and in whatever mode a model is patched, the last mode counts, whoever wraps a "
    "forward before or in between, and whatever a hook does inside of an attention: fail, run or "
    "copy the model, or change its configuration; unpatch_model then gives back the very model "
    "that was.",
    clipped_cases,
    examples=0.3,
)
def modes(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three modes drawn from the seed, with a forward after each, undone and patched again."""
    needs_patch(adapter, exact=True)
    case = replace(case, run=replace(case.run, chunks=1))
    expected = {
        True: observe(reference(case.model), case, backward=False),
        False: observe(reference(case.model.without_clip()), case, backward=False),
    }
    model = hf_model(case.model)
    model.train(case.run.training)
    made: Any = make_adapter(adapter, model)
    draw, attention = drawing(case), model.model.layers[-1].self_attn
    early, late = (_wrapped(attention) if draw(2) else None), None
    subject, before = Subject(model, dict(model.named_parameters())), _attributes(model)
    drawn = [bool(case.run.token_seed >> turn & 1) for turn in range(3)]

    def again(exact: bool, name: str) -> Iterator[Gap]:
        with at_work(f"prepare_model, exact_clip={exact}"):
            made.prepare_model(model, exact_clip=exact)
        happens = EVENTS[draw(len(EVENTS))]
        with at_work(f"an attention within which a hook did: {happens.__doc__}"):
            told = f"exact_clip={exact} {name}"
            yield from labelled(told, happens(subject, case, expected[exact]))
        actual = observe(subject, case, backward=False)
        yield from logits_gap(expected[exact], actual, f"logits, exact_clip={exact} {name}")
        yield from left_over(subject, case)

    for turn, exact in enumerate(drawn):
        yield from again(exact, f"after {drawn[:turn]}")
        late = _wrapped(attention) if turn == 0 and draw(2) else late
    undo = unpatcher(adapter)
    if undo is None:
        return
    for times in ("once", "twice"):
        with at_work("unpatch_model"):
            undo(model)
        if late is not None:
            if vars(attention).pop("forward", None) is not late:
                yield Gap("forward", "contract", "has been wrapped since, and the wrapper is gone")
            vars(attention).update({} if early is None else {"forward": early})
            late = None
        for name in changed(before, _attributes(model)):
            yield Gap(name, "contract", f"not what it was, unpatched {times}")
        actual = observe(subject, case, backward=False)
        yield from logits_gap(expected[True], actual, f"logits, unpatched {times}")
    yield from again(not drawn[-1], "after unpatch_model")


@check(
    "patch.threads",
    "Four threads may run one patched model at once: each gets its own logits, nobody outside of "
    "an attention sees a changed configuration, and nothing is left over.",
    clipped_cases,
    examples=0.15,
)
def threads(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three threads are held inside of an attention while the fourth runs through it and leaves."""
    needs_patch(adapter)
    exact = has_exact(adapter) and bool(case.run.token_seed & 1)
    subject = patched(case.model, adapter, exact_clip=True if exact else None)
    truth = reference(case.model if exact else case.model.without_clip())
    runs = [replace(case.run, token_seed=case.run.token_seed + turn) for turn in range(THREADS)]
    tokens = [inputs(replace(case, run=run, tokens=())).tokens for run in runs]
    with torch.no_grad():
        expected = {turn: truth.model(each).logits for turn, each in enumerate(tokens)}
    found: dict[int, torch.Tensor] = {}
    broken: list[Exception] = []
    held: set[int] = set()
    arrived, leave = threading.Semaphore(0), threading.Event()

    def wait(*_: object) -> None:
        if threading.get_ident() in held:
            arrived.release()
            leave.wait(PATIENCE)

    def run(turn: int, holds: bool) -> None:
        if holds:
            held.add(threading.get_ident())
        try:
            with torch.no_grad():
                found[turn] = subject.model(tokens[turn]).logits
        except Exception as error:
            broken.append(error)
            arrived.release()

    handle = subject.model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(wait)
    workers = [threading.Thread(target=run, args=(turn, turn > 0)) for turn in range(THREADS)]
    try:
        for worker in workers[1:]:
            worker.start()
        for _ in workers[1:]:
            arrived.acquire(timeout=PATIENCE)
        workers[0].start()
        workers[0].join(PATIENCE)
        if subject.model.config.clip_qkv != case.model.clip_qkv:
            yield Gap("config.clip_qkv", "contract", f"now says {subject.model.config.clip_qkv}")
    finally:
        leave.set()
        for worker in workers[1:]:
            worker.join(PATIENCE)
        handle.remove()
    with at_work("four threads"):
        if broken:
            raise broken[0]
    names = {turn: f"logits of thread {turn}, exact_clip={exact}" for turn in found}
    yield from exact_gaps(
        {name: expected[turn] for turn, name in names.items()},
        {name: found[turn] for turn, name in names.items()},
    )
    yield from left_over(subject, case)
