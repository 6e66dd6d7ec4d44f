"""Hooks under gradient checkpointing, which computes each block once more in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformer_lens.hook_points import HookPoint

from conformance.checks.forked import behind_flags_too
from conformance.checks.hooking import Log, Pairs, run_hooked, value_gaps
from conformance.checks.interventions import edited_runs
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing
from conformance.compare import (
    Gap,
    compare_firing,
    compare_gradients,
    compare_parameters,
    compare_tensors,
    labelled,
)
from conformance.edits import edited
from conformance.inputs import inputs
from conformance.observe import observe, options, sites_of, started
from conformance.points import OnPurposeError
from conformance.recorder import Observation, Recorder
from conformance.sites import Site, fired_rows
from conformance.spec import Case, Edit
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly

# Sites inside of a checkpoint, whose edits every input feels, and what is computed again saves.
_FELT = ("ln1.hook_out", "attn.v.hook_out", "attn.hook_out", "mlp.gate.hook_out")


class _Replayed(Recorder):
    """Keeps what a site shows the second time apart from what it showed first."""

    def begin(self, case: Case) -> None:
        """Forget the last run."""
        super().begin(case)
        self.again: list[tuple[str, torch.Tensor]] = []

    def value(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a site's tensor as it is now."""
        if name in self.values:
            self.again.append((name, tensor))
        else:
            super().value(name, tensor)


def trained_cases() -> SearchStrategy[Case]:
    """Cases in train mode, without a cache, with an edit that returns a tensor."""

    def trained(case: Case) -> Case:
        run = replace(case.run, training=True, use_cache=False, chunks=1)
        return replace(case, run=run)

    # Where it checkpoints, Hugging Face has the embedding's output require a gradient, whatever a
    # hook has made of it: an edit that cuts the graph is another one there.
    rows = [site.name for site in fired_rows() if site.name != "embed.hook_out"]
    return cases(runs=partial(edited_runs, most=1, rows=rows)).map(trained)


def _replay(
    names: Iterable[str], expected: Observation, again: list[str], *, whole: bool
) -> Iterator[Gap]:
    """A block's hooks inside its checkpoint fire again in order, the last block's first.

    PyTorch stops when it has all that the backward asks for: behind the last operation that saves
    its input, which is the MLP's last projection.
    """
    left = list(again)
    inner: dict[str, list[str]] = {}
    for name in names:
        block = ".".join(name.split(".")[:2])
        if name.startswith("blocks.") and name not in (f"{block}.hook_in", f"{block}.hook_out"):
            inner.setdefault(block, []).append(name)
    for block, due in reversed(inner.items()):
        fired = list(takewhile(lambda name, due=due: name in due, left))  # type: ignore[misc]
        left = left[len(fired) :]
        last = due[-1] if whole else f"{block}.mlp.out.hook_in"
        least = due.index(last) + 1
        if not any(name in expected.gradients for name in due):
            least = 0  # an edit has cut it off: no gradient reaches this block
        if fired != due[: len(fired)] or len(fired) < least:
            yield from compare_firing(due[: max(least, len(fired))], fired)
    for name in left:
        yield Gap(name, "count", "fired again outside of a recomputed block")


@check(
    "firing.recomputed",
    "Under gradient checkpointing (reentrant off), forward hooks inside a block fire once more "
    "when the backward recomputes it, as far as it does, and the others once, both times with the "
    "reference's tensor; backward hooks fire once, in reverse order, with its gradient; an edit "
    "acts in the recomputation too, reentrant or not, also where its hook is gone by then, or "
    "behind a flag, be it off by then, or where one backward is of several forwards, each with "
    "hooks of its own; an error there leaves none of them on.",
    trained_cases,
    examples=0.4,
)
def recomputed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Against a reference that never recomputes, with and without PyTorch's early stop."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    plain = {name: site for name, site in every.items() if not site.derived}
    expected = observe(reference(case.model), case, sites=every)
    whole, passing = bool(case.run.token_seed % 2), bool(case.run.token_seed // 2 % 2)
    # The reentrant kind gives no gradient at all to a block whose input an edit has cut off.
    uncut = all(edit.kind != "replace" for edit in case.run.edits)
    reentrant = passing and uncut and bool(case.run.token_seed // 4 % 2)
    with at_work("enabling checkpoints"):
        enable = subject.model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})  # type: ignore[no-untyped-call]
    with set_checkpoint_early_stop(not whole):
        yield from behind_flags_too(adapter, subject, case, passing=case.run.token_seed % 3 > 0)
        if passing:
            yield from labelled("two forwards, one backward", _both(subject, case, plain))
            yield from labelled("hooks gone by then", _passing(subject, case, expected, plain))
            yield from labelled("a hook that fails in the backward", _failing(subject, case))
        else:
            yield from _watched(subject, case, expected, plain, every, whole=whole)


def _watched(
    subject: Subject,
    case: Case,
    expected: Observation,
    plain: dict[str, Site],
    every: dict[str, Site],
    *,
    whole: bool,
) -> Iterator[Gap]:
    """Hooks on everything, forwards and backwards, from the start to the end."""
    recorder = _Replayed()
    actual = observe(subject, case, sites=plain, recorder=recorder)
    yield from compare_firing(every, actual.fired)
    yield from _replay(every, expected, [name for name, _ in recorder.again], whole=whole)
    for name, tensor in (*actual.values.items(), *recorder.again):
        if name in every:
            yield from value_gaps(name, every[name], expected, tensor)
    due = [name for name in reversed(plain) if name in expected.gradients]
    yield from compare_firing(due, actual.fired_backward)
    yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)


def _felt(case: Case, draw: Callable[[int], int]) -> str:
    """A drawn site of `_FELT` in a drawn block."""
    return f"blocks.{draw(case.model.num_hidden_layers)}.{_FELT[draw(len(_FELT))]}"


def _both(subject: Subject, case: Case, plain: dict[str, Site]) -> Iterator[Gap]:
    """Forwards with another edit and with none, in either order, then one backward of both."""
    if case.model.tie_word_embeddings:
        return  # of a tied weight four gradients are added, in no order that anything promises
    draw, data, bridge = drawing(case), inputs(case), bridge_of(subject)
    site = _felt(case, draw)
    edit = Edit(site=site, kind=("scale", "noise")[draw(2)], seed=draw(2**16))
    runs = [replace(case, run=replace(case.run, edits=edits)) for edits in ((edit,), ())]
    runs = runs[:: 1 if draw(2) else -1]
    edited_by = _by_pytorch if draw(2) else _by_bridge
    with at_work("two forwards and a backward of both"):
        outputs = []
        for its in runs:
            given = {"return_type": "logits", **options(subject, case)}
            with started(subject, case), edited_by(subject, its):
                outputs.append(bridge(data.tokens, **given))
        torch.autograd.backward(outputs, [data.probe.to(outputs[0].dtype)] * 2)
    got = {name: parameter.grad for name, parameter in subject.parameters.items()}
    bridge.zero_grad()
    one, other = (observe(reference(case.model), its, sites=plain) for its in runs)
    added = {
        name: gradient + other.parameter_gradients[name]  # type: ignore[operator]
        for name, gradient in one.parameter_gradients.items()
    }
    due, actual = (replace(one, parameter_gradients=each) for each in (added, got))
    yield from compare_parameters(due, actual)


@contextmanager
def _by_bridge(subject: Subject, case: Case) -> Iterator[None]:
    """The edits of a case as hooks of the bridge."""
    with bridge_of(subject).hooks(fwd_hooks=_edits(case)):
        yield


@contextmanager
def _by_pytorch(subject: Subject, case: Case) -> Iterator[None]:
    """The edits of a case as PyTorch's hooks, of those that take keywords, on the hook points."""

    def hook(edit: Edit, point: HookPoint, args: Any, named: Any, output: torch.Tensor) -> Any:
        return edited(edit, output)

    points = bridge_of(subject).hook_dict
    with ExitStack() as stack:
        for edit in case.run.edits:
            point = points[edit.site]
            its = partial(hook, edit)
            stack.enter_context(point.register_forward_hook(its, with_kwargs=True))
        yield


def _edits(case: Case) -> Pairs:
    return [(edit.site, partial(_perform, edit)) for edit in case.run.edits]


def _passing(
    subject: Subject, case: Case, expected: Observation, plain: dict[str, Site]
) -> Iterator[Gap]:
    """The edit and the backward hooks, in a run_with_hooks that is over when the backward comes."""
    log = Log()
    listeners: Pairs = [(name, log.listener(name)) for name in plain]
    logits = run_hooked(
        subject, case, {"run_with_hooks": _edits(case)}, {"run_with_hooks": listeners}
    )
    gap = compare_tensors("logits", expected.logits, logits, exactly(logits.dtype))
    yield from [gap] if gap else []
    seen = {name: tensors[0] for name, tensors in log.tensors.items() if tensors}
    trained = {name: parameter.grad for name, parameter in subject.parameters.items()}
    actual = Observation(
        logits, gradients=seen, fired_backward=tuple(log.order), parameter_gradients=trained
    )
    yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)


def _failing(subject: Subject, case: Case) -> Iterator[Gap]:
    """A hook that changes a forward and fails in its recomputation: the caller hears of it."""
    draw, data, calls = drawing(case), inputs(case), []
    site = _felt(case, draw)

    def hook(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        calls.append(site)
        if len(calls) == 2:
            raise OnPurposeError
        return -tensor

    given = {"return_type": "logits", **options(subject, case)}
    with at_work("a hook that fails in the backward"):
        with started(subject, case):
            run = bridge_of(subject).run_with_hooks
            logits = run(data.tokens, fwd_hooks=[(site, hook)], **given)
        try:
            logits.backward(data.probe.to(logits.dtype))
        except OnPurposeError:
            calls.append("heard of")
    bridge_of(subject).zero_grad()
    if calls != [site, site, "heard of"]:
        yield Gap(site, "count", f"called {calls.count(site)} times, or its error is not heard of")
    bare = replace(case, run=replace(case.run, edits=()))
    due, got = (observe(each, bare) for each in (reference(case.model), subject))
    gap = compare_tensors("logits", due.logits, got.logits, exactly(got.logits.dtype))
    yield from [gap] if gap else []
    yield from compare_parameters(due, got)


def _perform(edit: Edit, tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return edited(edit, tensor)
