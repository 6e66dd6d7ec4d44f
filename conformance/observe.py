"""Run a subject once and keep what is to be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from conformance.inputs import Inputs, derived_positions, inputs
from conformance.points import hooked
from conformance.recorder import Observation, Recorder
from conformance.sites import Site, observable
from conformance.spec import Case
from conformance.subjects import Subject, at_work
from conformance.taps import TappedCache, Taps


def module_of(subject: Subject) -> nn.Module:
    """What is called: the bridge, or the Hugging Face model."""
    return subject.bridge if subject.bridge is not None else subject.model


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a subject's module returns, ``[batch, pos, d_vocab]``."""
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def arguments(subject: Subject, case: Case) -> dict[str, Any]:
    """The keyword arguments of a forward that a subject's module is given the whole input in."""
    plain = replace(case, run=replace(case.run, chunks=1))
    (given,) = _chunks(subject, plain, inputs(case), None)
    return given


def options(subject: Subject, case: Case) -> dict[str, Any]:
    """As `arguments`, but for the tokens and what is to be returned."""
    told = ("input", "input_ids", "return_type")
    return {name: value for name, value in arguments(subject, case).items() if name not in told}


def _chunks(
    subject: Subject, case: Case, data: Inputs, taps: Taps | None
) -> Iterator[dict[str, Any]]:
    """The keyword arguments of each successive forward."""
    run = case.run
    bounds = [run.seq_len * chunk // run.chunks for chunk in range(run.chunks + 1)]
    cache: DynamicCache | None = None
    if taps is not None and run.use_cache:
        # A tap must see a key before the cache stores it: the cache changes its memory layout, and
        # so the rounding of what an edited key is multiplied with.
        cache = TappedCache(taps, config=subject.model.config)
    elif run.chunks > 1:
        cache = DynamicCache(config=subject.model.config)
    for start, stop in pairwise(bounds):
        given: dict[str, Any] = {"use_cache": run.use_cache}
        if subject.bridge is None:
            given["input_ids"] = data.tokens[:, start:stop]
        else:
            given |= {"input": data.tokens[:, start:stop], "return_type": "logits"}
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


def _in_mode(subject: Subject, case: Case) -> nn.Module:
    """What is called, in the run's mode. Setting the mode walks through all modules."""
    module = module_of(subject)
    if module.training != case.run.training:
        module.train(case.run.training)
    return module


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Draw from this seed meanwhile.

    Not by `torch.manual_seed`: without CUDA it keeps a stack trace for every call.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def started(subject: Subject, case: Case) -> Iterator[None]:
    """The mode and the random state that a run begins with."""
    _in_mode(subject, case)
    with _random_state(case.run.token_seed):
        yield


def run_forward(
    subject: Subject, case: Case, data: Inputs, recorder: Recorder, taps: Taps | None = None
) -> torch.Tensor:
    """All forwards of a run, from equal random states: the logits ``[batch, pos, d_vocab]``."""
    module = _in_mode(subject, case)
    pieces = []
    with _random_state(case.run.token_seed):
        for recorder.chunk, given in enumerate(_chunks(subject, case, data, taps)):
            pieces.append(logits_of(module(**given)))
        recorder.random_state = torch.default_generator.get_state()
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _gradients(
    subject: Subject, logits: torch.Tensor, probe: torch.Tensor, recorder: Recorder
) -> dict[str, torch.Tensor | None]:
    """Send the probe back through the logits: the gradients of the parameters, by name.

    Where the sites' tensors are known they are asked for theirs. Else it is a plain ``backward``,
    and backward hooks record them.
    """
    seed, parameters = probe.to(logits.dtype), subject.parameters
    if not logits.requires_grad:  # a replaced output has no gradient to send back
        return dict.fromkeys(parameters)
    if not recorder.differentiable:
        logits.backward(seed)  # type: ignore[no-untyped-call]
        found = {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in parameters.items()
        }
        for parameter in parameters.values():
            parameter.grad = None
        return found
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    sources = [source for source, _ in recorder.differentiable.values()]
    asked = [*sources, *trained.values()]
    got = torch.autograd.grad(logits, asked, seed, allow_unused=True)
    seen = zip(recorder.differentiable.items(), got[: len(sources)], strict=True)
    for (name, (_, turn)), gradient in reversed(list(seen)):
        if gradient is not None:
            recorder.gradient(name, turn(gradient))
    by_name = dict(zip(trained, got[len(sources) :], strict=True))
    return {name: by_name.get(name) for name in parameters}


def _is_frozen(subject: Subject) -> bool:
    return not any(parameter.requires_grad for parameter in subject.parameters.values())


def plain_run(subject: Subject, case: Case, data: Inputs) -> Callable[[], None]:
    """A bare forward and backward, with nothing observed, ready to be called."""
    module = _in_mode(subject, case)
    given = list(_chunks(subject, case, data, None))
    probe = data.probe

    def run() -> None:
        pieces = [logits_of(module(**each)) for each in given]
        logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        logits.backward(probe.to(logits.dtype))  # type: ignore[no-untyped-call]

    return run


Look = Callable[[Case, Inputs], Observation]


@contextmanager
def watched(
    subject: Subject,
    d_head: int,
    *,
    sites: Mapping[str, Site] | None = None,
    backward: bool = True,
    gradients_at: Collection[str] | None = None,
    returned: bool = False,
    recorder: Recorder | None = None,
) -> Iterator[Look]:
    """Put taps or hooks on a subject once, to run it as often as is wanted.

    Args:
        subject: What to run.
        d_head: Size of a head of its model.
        sites: What to record of a Hugging Face model; a bridge shows every hook point it has.
            None records nothing: the bare model, with no hook of ours on it.
        backward: Send the probe back through the logits. If not, gradient mode is off, but for a
            model that is frozen.
        gradients_at: Sites of a bridge to hook backwards; None hooks all of ``sites``.
        returned: Take the sites' gradients from what the forward hooks of a bridge return, a view
            of what they were given, instead of from backward hooks. That must change nothing, and
            costs a fifth. Nor are the values copied, unless one turns out to have been written to
            in place after its hook; then the run is made once more.
        recorder: What keeps and edits, if not a plain one.

    Yields:
        A function that runs a case on the subject, given the case's inputs. The case's model must
        be the subject's: it is not looked at again.
    """
    recorder = recorder or Recorder()
    recorder.hooking |= bool(getattr(subject.model.model, "gradient_checkpointing", False))
    around: Any = nullcontext()
    taps: Taps | None = None
    if sites is not None and subject.bridge is not None:
        at = sites if gradients_at is None else gradients_at
        asked = returned or recorder.asking
        backwards = frozenset(at) if backward and not asked else frozenset()
        around = hooked(subject, recorder, sites, backwards, returned)
    elif sites is not None:
        taps = Taps(
            subject.model,
            sites,
            recorder.visit,
            d_head=d_head,
            clamps=subject.clamps,
            copies=subject.under_test,
            see=recorder.see,
        )
        around = taps.attached()

    def run(case: Case, data: Inputs) -> Observation:
        recorder.begin(case)
        if taps is not None:
            taps.cached = case.run.use_cache
            # A gradient is edited at a node of its own.
            taps.editing = sites or () if recorder.edits_gradients else recorder.edits
        with at_work("running") if subject.under_test else nullcontext():
            # What is frozen needs no such guard against a graph.
            with torch.set_grad_enabled(backward or _is_frozen(subject)):
                logits = run_forward(subject, case, data, recorder, taps)
            gradients = _gradients(subject, logits, data.probe, recorder) if backward else {}
        return Observation(
            logits.detach(),
            recorder.values,
            recorder.gradients,
            gradients,
            tuple(recorder.fired),
            tuple(recorder.fired_backward),
            recorder.random_state,
        )

    def look(case: Case, data: Inputs) -> Observation:
        recorder.copying = not returned
        seen = run(case, data)
        if recorder.overwritten():
            recorder.copying = True
            seen = run(case, data)
        return seen

    with around:
        yield look


def observe(
    subject: Subject,
    case: Case,
    *,
    sites: Mapping[str, Site] | None = None,
    backward: bool = True,
    gradients_at: Collection[str] | None = None,
    recorder: Recorder | None = None,
    data: Inputs | None = None,
) -> Observation:
    """Run a subject once, forwards, and backwards if asked, and keep what it showed.

    See `watched` for the arguments; ``data`` is what to feed, and None draws it from the case.
    """
    if case.run.chunks > 1:  # a backward hook would not know which forward it is of
        gradients_at = ()
    with watched(
        subject,
        case.model.d_head,
        sites=sites,
        backward=backward,
        gradients_at=gradients_at,
        recorder=recorder,
    ) as look:
        return look(case, data or inputs(case))


def sites_of(subject: Subject, case: Case) -> dict[str, Site]:
    """The sites that a subject's plain forward must fire."""
    return observable(case.model, subject.optional_hooks)
