"""The patch on whatever looks like an OLMo: without a clip, in other modes, in other threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from conformance.checks.forward import logits_gap
from conformance.checks.patch import left_over
from conformance.checks.registry import Adapter, check
from conformance.checks.support import exact_gaps, has_exact, needs_patch
from conformance.compare import Gap
from conformance.inputs import inputs
from conformance.observe import observe
from conformance.points import OnPurposeError
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


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
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
    for name in _changed(before, _attributes(model)):
        yield Gap(name, "contract", "was changed, though there is no clip")
    subject = Subject(model, dict(model.named_parameters()))
    expected = observe(reference(case.model), case, backward=False)
    yield from logits_gap(expected, observe(subject, case, backward=False))


def _trouble(*_: object) -> None:
    raise OnPurposeError


@check(
    "patch.modes",
    "However often and in whatever mode a model is patched, the last mode counts, also after an "
    "exception inside of an attention; unpatch_model then gives back the very model that was.",
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
    subject, before = Subject(model, dict(model.named_parameters())), _attributes(model)
    drawn = [bool(case.run.token_seed >> turn & 1) for turn in range(3)]

    def again(exact: bool, name: str) -> Iterator[Gap]:
        with at_work(f"prepare_model, exact_clip={exact}"):
            made.prepare_model(model, exact_clip=exact)
        handle = model.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(_trouble)
        with suppress(OnPurposeError):
            model(torch.zeros((1, 1), dtype=torch.long))
        handle.remove()
        actual = observe(subject, case, backward=False)
        yield from logits_gap(expected[exact], actual, f"logits, exact_clip={exact} {name}")
        yield from left_over(subject, case)

    for turn, exact in enumerate(drawn):
        yield from again(exact, f"after {drawn[:turn]}")
    undo = unpatcher(adapter)
    if undo is None:
        return
    for times in ("once", "twice"):
        with at_work("unpatch_model"):
            undo(model)
        for name in _changed(before, _attributes(model)):
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


class _Projection:
    """Doubles what it is given, and keeps what it gave."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.gave = x * 2
        return self.gave


class _Attention:
    """An attention of nobody's library, which clamps as OLMo's does."""

    def __init__(self, config: Any, letters: str) -> None:
        self.config = config
        for letter in letters:
            setattr(self, f"{letter}_proj", _Projection())

    def forward(self, hidden: torch.Tensor, *, note: str) -> tuple[Any, ...]:
        projections = [getattr(self, f"{letter}_proj", _Projection()) for letter in "qkv"]
        given = [projection(hidden) for projection in projections]
        clip = self.config.clip_qkv
        for tensor in given if clip is not None else ():
            tensor.clamp_(min=-clip, max=clip)
        return (*given, clip, note)


@check(
    "patch.duck_typed",
    "Whatever has config.clip_qkv and model.layers[i].self_attn is patched, in either mode; an "
    "exact mode without q_proj, k_proj and v_proj is refused before anything is touched.",
    clipped_cases,
    examples=0.1,
)
def duck_typed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Plain objects with three layers, of which the last lacks one projection at the end."""
    needs_patch(adapter)
    made: Any = make_adapter(adapter, hf_model(case.model))
    clip = case.model.clip_qkv
    config = SimpleNamespace(clip_qkv=clip)

    def duck(*letters: str) -> tuple[Any, list[_Attention]]:
        attentions = [_Attention(config, each) for each in letters]
        layers = [SimpleNamespace(self_attn=each) for each in attentions]
        return SimpleNamespace(config=config, model=SimpleNamespace(layers=layers)), attentions

    draw = torch.Generator().manual_seed(case.run.token_seed)
    # Half of it is clamped: as large as the clip before it is doubled.
    hidden = torch.randn((2, 3), generator=draw) * (clip or 1.0)
    plain = hidden * 2
    for exact in (False, True) if has_exact(adapter) else (False,):
        model, attentions = duck("qkv", "qkv", "qkv")
        before = [dict(vars(each)) for each in attentions]
        with at_work(f"prepare_model of what only looks like an OLMo, exact_clip={exact}"):
            made.prepare_model(model, **({"exact_clip": True} if exact else {}))
            made.prepare_model(model, **({"exact_clip": True} if exact else {}))
            given = [each.forward(hidden, note="kept") for each in attentions]
        due = plain.clamp(-clip, clip) if exact and clip is not None else plain
        for index, (*tensors, seen, note) in enumerate(given):
            name = f"layers[{index}].self_attn, exact_clip={exact}"
            yield from exact_gaps(
                {f"{name}: {letter}": due for letter in "qkv"},
                {f"{name}: {letter}": each for letter, each in zip("qkv", tensors, strict=True)},
            )
            kept = {x: getattr(attentions[index], f"{x}_proj").gave for x in "qkv"}
            yield from exact_gaps(
                {f"{name}: what {x}_proj gave": plain for x in "qkv"},
                {f"{name}: what {x}_proj gave": each for x, each in kept.items()},
            )
            if (seen, note) != (clip if exact else None, "kept"):
                yield Gap(name, "contract", f"was called with {note!r}, saw the clip {seen}")
        if config.clip_qkv != clip:
            yield Gap("config.clip_qkv", "contract", f"now says {config.clip_qkv}")
        undo = unpatcher(adapter)
        if undo is not None:
            with at_work("unpatch_model"):
                undo(model)
            for index, attention in enumerate(attentions):
                for name in _changed(before[index], dict(vars(attention))):
                    yield Gap(f"layers[{index}].self_attn.{name}", "contract", "not what it was")
    if has_exact(adapter):
        yield from _refused(made, *duck("qkv", "qkv", "qk"))


def _refused(made: Any, model: Any, attentions: list[_Attention]) -> Iterator[Gap]:
    before = [dict(vars(each)) for each in attentions]
    try:
        made.prepare_model(model, exact_clip=True)
    except Exception as error:
        if "v_proj" not in str(error):
            yield Gap("without v_proj", "contract", f"the error does not name it: {error}")
    else:
        yield Gap("without v_proj", "contract", "is not refused")
    for index, attention in enumerate(attentions):
        for name in _changed(before[index], dict(vars(attention))):
            yield Gap(f"layers[{index}].self_attn.{name}", "contract", "was touched, then refused")
