"""Run a subject once and keep what is to be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from conformance.edits import edited
from conformance.inputs import Inputs, derived_positions, inputs
from conformance.sites import Site, observable
from conformance.spec import Case
from conformance.subjects import Subject, at_work
from conformance.taps import TappedCache, Taps, Turn

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
        random_state: PyTorch's random state after the last forward.
    """

    logits: torch.Tensor
    values: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    parameter_gradients: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    fired: tuple[str, ...] = ()
    fired_backward: tuple[str, ...] = ()
    random_state: torch.Tensor | None = None


class Recorder:
    """Collects what the sites show while a subject runs, and performs the run's edits there.

    Attributes:
        hooking: Get gradients by hooks on a Hugging Face model's tensors and a plain backward:
            checkpointing refuses to be asked for those of tensors.
        edits_gradients: Whether `gradient` may return another one.
    """

    hooking = False
    edits_gradients = False

    def begin(self, case: Case) -> None:
        """Forget the last run."""
        self.edits = {edit.site: edit for edit in case.run.edits}
        self.backward = case.run.chunks == 1
        self.chunk = 0
        self.values: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.fired: list[str] = []
        self.fired_backward: list[str] = []
        self.differentiable: dict[str, tuple[torch.Tensor, Turn]] = {}
        self.random_state: torch.Tensor | None = None

    def key(self, name: str) -> str:
        """What a site's tensor of the present chunk is called."""
        return f"{name}#{self.chunk}" if self.chunk else name

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that the run's edit of a site leaves; the same object if there is none."""
        return edited(self.edits[name], tensor) if name in self.edits else tensor

    def value(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a site's tensor; it must be nobody else's to change."""
        key = self.key(name)
        self.fired.append(key)
        self.values[key] = tensor

    def gradient(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep a site's gradient. What is returned takes its place; nothing of a plain recorder."""
        if self.backward:
            self.fired_backward.append(name)
            self.gradients[name] = tensor
        return None

    def see(self, name: str, value: torch.Tensor, source: torch.Tensor, turn: Turn) -> None:
        """Keep a site's value, and where its gradient comes from."""
        self.value(name, value)
        self._differentiate(name, source, turn)

    def _differentiate(self, name: str, source: torch.Tensor, turn: Turn) -> None:
        if not (source.requires_grad and self.backward):
            return
        if self.hooking or self.edits_gradients:
            source.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self.gradient(name, turn(gradient).detach().clone())
            )
        else:
            self.differentiable[name] = source, turn

    def visit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Edit and keep a tensor of a tapped Hugging Face model (see `conformance.taps`)."""
        tensor = self.edit(name, tensor)
        self.value(name, tensor.detach())
        self._differentiate(name, tensor, _same)
        return tensor


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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
            new = tensor.view_as(tensor) if new is None else new
            recorder.differentiable[name] = new, _same
        recorder.value(name, (tensor if new is None else new).detach().clone())
        return new

    return hook


def _gradient_hook(recorder: Recorder, name: str) -> Callable[..., torch.Tensor | None]:
    def hook(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
        return recorder.gradient(name, tensor.detach().clone())

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
def _hooked(
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
        backward: Send the probe back through the logits.
        gradients_at: Sites of a bridge to hook backwards; None hooks all of ``sites``.
        returned: Take the sites' gradients from what the forward hooks of a bridge return, a view
            of what they were given, instead of from backward hooks. That must change nothing, and
            costs a fifth.
        recorder: What keeps and edits, if not a plain one.

    Yields:
        A function that runs a case on the subject, given the case's inputs. The case's model must
        be the subject's: it is not looked at again.
    """
    recorder = recorder or Recorder()
    recorder.hooking = bool(getattr(subject.model.model, "gradient_checkpointing", False))
    around: Any = nullcontext()
    taps: Taps | None = None
    if sites is not None and subject.bridge is not None:
        at = sites if gradients_at is None else gradients_at
        hooked = frozenset(at) if backward and not returned else frozenset()
        around = _hooked(subject, recorder, sites, hooked, returned)
    elif sites is not None:
        clamps = subject.clamps
        taps = Taps(
            subject.model, sites, recorder.visit, d_head=d_head, clamps=clamps, see=recorder.see
        )
        around = taps.attached()

    def look(case: Case, data: Inputs) -> Observation:
        recorder.begin(case)
        if taps is not None:
            taps.cached = case.run.use_cache
            # A gradient is edited at a node of its own.
            taps.editing = sites or () if recorder.edits_gradients else recorder.edits
        with at_work("running") if subject.under_test else nullcontext():
            with torch.set_grad_enabled(backward):
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
