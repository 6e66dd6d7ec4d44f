"""Steps that change a bridge: its flags, modes, dtype, weights, and the bridge itself."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace

import torch

from conformance.checks.compatibility import probability_gaps
from conformance.checks.forked import is_exact
from conformance.checks.support import quiet
from conformance.compare import Gap, bitwise
from conformance.machine.executor import Machine, Original, named_parameters
from conformance.machine.moves import move
from conformance.observe import observe
from conformance.spec import EXCLUSIVE, PROCESSING, Step
from conformance.subjects import at_work, unpatcher


def _changes_no_bit(machine: Machine, step: Step) -> bool:
    """Whether a flag may be on where all is compared bit for bit: ``flags.*`` judge the others."""
    return step.flag == "use_hook_mlp_in" or is_exact(machine.adapter)


@move("flag", _changes_no_bit)
def flag(machine: Machine, step: Step) -> Iterator[Gap]:
    """Turned over. The second of two that exclude each other is refused, and nothing changes."""
    name, flags = step.flag, machine.state.flags
    on = name not in flags
    if on and name in EXCLUSIVE and flags & EXCLUSIVE:
        try:
            getattr(machine.bridge, f"set_{name}")(True)
        except ValueError:
            return
        yield Gap(name, "contract", f"was not refused beside {sorted(flags & EXCLUSIVE)}")
        return
    with at_work(f"set_{name}({on})"):
        if step.seed % 2:
            setattr(machine.bridge.cfg, name, on)
        else:
            getattr(machine.bridge, f"set_{name}")(on)
    machine.now(flags=flags ^ {name})


@move("train")
def train(machine: Machine, step: Step) -> Iterator[Gap]:
    """Dropout acts."""
    with at_work("train()"):
        machine.bridge.train()
    machine.now(training=True)
    yield from ()


@move("eval")
def evaluate(machine: Machine, step: Step) -> Iterator[Gap]:
    """Dropout does not act."""
    with at_work("eval()"):
        machine.bridge.eval()
    machine.now(training=False)
    yield from ()


@move("cast")
def cast(machine: Machine, step: Step) -> Iterator[Gap]:
    """Weights and gradients move to another dtype, or to the one that they have."""
    state, dtype = machine.state, getattr(torch, step.dtype)
    # transformer_lens prints what it does.
    with at_work(f"to({step.dtype})"), quiet():
        if step.seed % 2:
            machine.bridge.to(dtype=dtype)
        else:
            machine.bridge.to(dtype)
    machine.now(
        weights={name: weight.to(dtype) for name, weight in state.weights.items()},
        gradients={name: gradient.to(dtype) for name, gradient in state.gradients.items()},
        casts=(*state.casts, step.dtype),
    )
    yield from ()


@move("load")
def load(machine: Machine, step: Step) -> Iterator[Gap]:
    """Other weights, all or half of them, under the names of the bridge's own state dict."""
    state, draw = machine.state, torch.Generator().manual_seed(step.seed)
    partial = step.seed % 2 == 1
    drawn = {
        name: state.model.weight_scale * torch.randn(weight.shape, generator=draw)
        for name, weight in state.weights.items()
    }
    names = {id(held): name for name, held in named_parameters(machine.bridge).items()}
    chosen = list(drawn)[step.seed % 2 :: 2] if partial else list(drawn)
    with at_work("load_state_dict"):
        kept = machine.bridge.state_dict(keep_vars=True)  # type: ignore[no-untyped-call]
        given = {key: drawn.get(names.get(id(held), ""), held) for key, held in kept.items()}
        if partial:
            given = {k: v for k, v in given.items() if names.get(id(kept[k])) in chosen}
        machine.bridge.load_state_dict(given, strict=not partial)  # type: ignore[no-untyped-call]
    dtype = getattr(torch, state.dtype)
    loaded = {name: drawn[name].to(dtype) for name in chosen}
    machine.now(weights={**state.weights, **loaded})
    yield from ()


@move("freeze")
def freeze(machine: Machine, step: Step) -> Iterator[Gap]:
    """All parameters, or every second one."""
    held = named_parameters(machine.bridge)
    chosen = list(held)[:: 1 + step.seed % 2]
    if step.seed % 2:
        for name in chosen:
            held[name].requires_grad_(False)
    else:
        machine.bridge.requires_grad_(False)
    machine.now(frozen=machine.state.frozen | set(chosen))
    yield from ()


@move("thaw")
def thaw(machine: Machine, step: Step) -> Iterator[Gap]:
    """All parameters."""
    machine.bridge.requires_grad_(True)
    machine.now(frozen=frozenset())
    yield from ()


@move("deepcopy")
def deepcopy(machine: Machine, step: Step) -> Iterator[Gap]:
    """The copy goes on; PyTorch copies hooks, and no gradients.

    Earlier originals live on: what a copy is without them must not hang on the garbage collector.
    """
    case, expected = machine.shown()
    if machine.original is not None:
        machine.kept.append(machine.original.bridge)
    machine.original = Original(machine.bridge, machine.state, case, expected.logits)
    with at_work("copy.deepcopy"):
        machine.bridge = copy.deepcopy(machine.bridge)
    machine.now(gradients={})
    yield from ()


@move("pickle", lambda machine, step: not machine.state.hooks)
def pickled(machine: Machine, step: Step) -> Iterator[Gap]:
    """What was loaded goes on; a refusal that tells a way out is as good."""
    kept = io.BytesIO()
    with at_work("pickling"):
        try:
            if step.seed % 2:
                torch.save(machine.bridge, kept)
            else:
                pickle.dump(machine.bridge, kept)
        except (TypeError, NotImplementedError) as refusal:
            if "state_dict" not in str(refusal):
                raise
            return
        kept.seek(0)
        loaded = torch.load(kept, weights_only=False) if step.seed % 2 else pickle.load(kept)
    machine.bridge = loaded
    machine.now(gradients={})
    yield from ()


def _processes(machine: Machine, step: Step) -> bool:
    """In a short dtype no bound is known of what processing rounds."""
    return step.seed % 2 == 0 and machine.state.wide


def _unedited(machine: Machine, step: Step) -> bool:
    """An edit means another thing after processing: it is made in another basis."""
    return all(edit.kind == "identity" for edit in machine.state.edits)


@move("compatibility", _unedited)
def compatibility(machine: Machine, step: Step) -> Iterator[Gap]:
    """With or without processing, for the first time or again.

    What processing does to the weights is judged by the log-probabilities. From then on the state
    is that of a Hugging Face model with these very weights, and all is compared bit for bit again.
    """
    case, processes = machine.probe(step.seed), _processes(machine, step)
    case = replace(case, run=replace(case.run, padding="none"))
    flags = {name: name in machine.case.run.processing for name in PROCESSING}
    due = observe(machine.truth(), case, backward=False).logits
    mode = f"enable_compatibility_mode({flags if processes else 'no_processing'})"
    with at_work(mode), quiet():
        machine.bridge.zero_grad()
        machine.bridge.enable_compatibility_mode(
            disable_warnings=True, no_processing=not processes, **flags
        )
    machine.now(compatible=True, gradients={})
    got = observe(machine.subject, case, backward=False).logits
    if not processes:
        yield from bitwise("logits", due, got)
        return
    due, got = due.log_softmax(-1), got.log_softmax(-1)
    yield from probability_gaps("log-probabilities", due, got, machine.truth(), case)
    yield from _follow(machine)


def _follow(machine: Machine) -> Iterator[Gap]:
    """Take the processed weights into the state, as far as Hugging Face's model has such."""
    modules = machine.truth().model.named_modules()
    places = {f"{at}.{leaf}" for at, module in modules for leaf in module._parameters}
    held, old = named_parameters(machine.bridge), machine.state
    for name in held.keys() - places:
        yield Gap(name, "extra", "a parameter that no OLMo of Hugging Face's has")
    frozen = {name for name in held.keys() - old.weights.keys() if not held[name].requires_grad}
    machine.now(
        weights={name: weight.detach().clone() for name, weight in held.items()},
        frozen=old.frozen | frozen,
    )


@move("prepare")
def prepare(machine: Machine, step: Step) -> Iterator[Gap]:
    """``prepare_model`` of the model that is bridged already: nothing is left to patch."""
    with at_work("prepare_model of a bridged model"):
        machine.bridge.adapter.prepare_model(machine.bridge.original_model)
    yield from ()


@move("unpatch", lambda machine, step: unpatcher(machine.adapter) is not None)
def unpatch(machine: Machine, step: Step) -> Iterator[Gap]:
    """A bridge clamps on its own, patched or not."""
    undo = unpatcher(machine.adapter)
    assert undo is not None
    with at_work("unpatch_model of a bridged model"):
        undo(machine.bridge.original_model)
    yield from ()
