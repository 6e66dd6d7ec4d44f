"""Copies and saves: an independent bridge comes out, or a clear refusal."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from conformance.checks.alive import record
from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    bridge_of,
    copied,
    drawing,
    exact_gaps,
    in_one_forward,
    quiet,
    sites_to_hook,
    turn,
)
from conformance.compare import (
    Gap,
    compare_parameters,
    compare_tensors,
    compare_values,
)
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.points import hook_points
from conformance.spec import DTYPES, FLAGS, Case
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly


def _state(bridge: Any) -> dict[str, object]:
    """What a bridge holds beside its numbers, by what each is called."""
    model = bridge.original_model
    weights = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    return {
        **{f"cfg.{name}": value for name, value in vars(bridge.cfg).items()},
        **{f"training of {name}": part.training for name, part in bridge.named_modules()},
        **{f"requires_grad of {name}": held.requires_grad for name, held in weights},
        # A tied pair is one parameter with two names.
        **{f"parameter of {name}": first.setdefault(id(held), name) for name, held in weights},
    }


def _state_gaps(due: dict[str, object], bridge: Any, label: str) -> Iterator[Gap]:
    got = _state(bridge)
    for name in dict.fromkeys((*due, *got)):
        was, now = due.get(name, "absent"), got.get(name, "absent")
        if was != now:
            yield Gap(f"{label}: {name}", "contract", f"{now!r:.60} instead of {was!r:.60}")


def _recorded_gaps(
    due: list[torch.Tensor], subject: Subject, truth: Subject, case: Case, label: str
) -> Iterator[Gap]:
    """What a bridge gives where hidden states are asked for, and gave before it was copied."""
    got = record(subject, truth, case, "hidden_states")
    numbered = (dict(zip(map(str, range(len(each))), each, strict=True)) for each in (due, got))
    for gap in exact_gaps(*numbered):
        yield replace(gap, site=f"{label}: hidden_states[{gap.site}]")


def _copied_late(subject: Subject, case: Case) -> Subject:
    """A copy made after a forward, or in the midst of one that keeps a graph, by a hook."""
    draw = drawing(case)
    if draw(2):
        return copied(subject)
    sites = list(sites_to_hook(subject, case))
    point = hook_points(subject)[sites[draw(len(sites))]]
    made: list[Subject] = []
    point.add_hook(lambda tensor, hook: made.append(copied(subject)))
    with at_work("a forward whose hook copies the bridge"):
        bridge_of(subject)(inputs(case).tokens)
    point.remove_hooks()
    bridge_of(made[0]).reset_hooks()
    return made[0]


@check(
    "copies.deepcopy",
    "copy.deepcopy of a bridge, before, in and after forwards, is an independent bridge: values, "
    "gradients, hooks, flags and weights never cross over, and both go on to give hidden states.",
    cases,
    examples=0.45,
)
def deepcopy(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The copy is judged as a bridge of its own, while the original is hooked, flagged, changed."""
    case = replace(case, run=replace(case.run, chunks=1))
    original = bridged(case.model, adapter, prepared=case.run.prepared)
    early = copied(original)
    assert original.bridge is not None
    yield from _state_gaps(_state(original.bridge), early.bridge, "copied before a forward")
    observe(original, case)
    truth = reference(case.model)
    due = None if drawing(case)(4) else record(original, truth, case, "hidden_states")
    late = _copied_late(original, case)
    with at_work("copying a bridge together with its optimizer"):
        pair = original.bridge, torch.optim.SGD(original.bridge.parameters())
        twin, optimizer = copy.deepcopy(pair)
    steps = [id(each) for each in optimizer.param_groups[0]["params"]]
    if steps != [id(each) for each in twin.parameters()]:
        yield Gap("copied together", "contract", "the optimizer trains other tensors")
    for name, subject in (("the original", original), ("its copy", late)):
        yield from () if due is None else _recorded_gaps(due, subject, truth, case, name)
    crossed: list[str] = []
    for name, point in original.bridge.hook_dict.items():
        point.add_hook(lambda tensor, hook, name=name: crossed.append(name))
    with at_work("setting a flag"):
        original.bridge.set_use_hook_mlp_in(True)
        original.bridge.set_use_attn_result(True)
    with torch.no_grad():
        for parameter in original.parameters.values():
            parameter.mul_(2)
    wanted = sites_of(original, case)
    expected = observe(truth, case, sites=wanted)
    for name, subject in (("copied before a forward", early), ("copied in or after one", late)):
        actual = observe(subject, case, sites=wanted, gradients_at=frozenset())
        for gap in (
            *compare_values(expected, actual, wanted),
            *compare_parameters(expected, actual),
        ):
            yield replace(gap, site=f"{name}: {gap.site}")
        bridge = subject.bridge
        assert bridge is not None
        for flag in ("use_hook_mlp_in", "use_attn_result"):
            if getattr(bridge.cfg, flag):
                yield Gap(f"{name}: cfg.{flag}", "contract", "was set on the original only")
    if crossed:
        yield Gap(crossed[0], "contract", "a hook of the original fired in a forward of its copy")
    if any(parameter.grad is not None for parameter in original.parameters.values()):
        yield Gap("gradients", "contract", "a backward of the copy reached the original")


@check(
    "copies.pickle",
    "Pickling and torch.save of a bridge give an equal bridge, with its flags, its mode, its ties "
    "and what is frozen, or refuse with one clear error; hidden states are given as before.",
    lambda: cases(models=model_specs(ties=st.sampled_from((False, True)))),
    examples=0.1,
)
def pickled(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A refusal is a TypeError or NotImplementedError that says what to do instead.

    A flag may be set on the bridge, parameters of it frozen, and its mode is any.
    """
    case, draw = in_one_forward(case), drawing(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    turn(subject, FLAGS[draw(len(FLAGS) + 2) :][:1], True)
    expected = observe(subject, case, backward=False)
    for parameter in subject.parameters.values():
        parameter.requires_grad_(bool(draw(2)))
    mode, truth, subjects = bool(draw(2)), reference(case.model), {"the original": subject}
    states = record(subject, truth, case, "hidden_states") if draw(3) else None
    bridge_of(subject).train(mode)
    due = _state(subject.bridge)
    for name in ("pickle", "torch.save"):
        kept = io.BytesIO()
        try:
            if name == "pickle":
                pickle.dump(subject.bridge, kept)
            else:
                torch.save(subject.bridge, kept)
        except (TypeError, NotImplementedError) as refusal:
            if "state_dict" not in str(refusal):
                yield Gap(name, "contract", f"refuses without a way out: {refusal}")
            continue
        except Exception as error:
            yield Gap(name, "contract", f"{type(error).__name__}: {error}")
            continue
        kept.seek(0)
        with at_work(f"loading what {name} wrote"):
            bridge = pickle.load(kept) if name == "pickle" else torch.load(kept, weights_only=False)
        yield from _state_gaps(due, bridge, name)
        loaded = replace(subject, bridge=bridge, model=bridge.original_model, parameters={})
        yield from logits_gap(expected, observe(loaded, case, backward=False), f"{name}: logits")
        subjects[name] = loaded
    for name, each in subjects.items():
        yield from () if states is None else _recorded_gaps(states, each, truth, case, name)


@check(
    "copies.state_dict",
    "A state dict saved from one bridge and loaded into another carries every weight, bit for bit.",
    cases,
    examples=0.3,
)
def state_dict(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Through torch.save, so that nothing is shared."""
    source = bridged(case.model, adapter, prepared=case.run.prepared)
    other = replace(case.model, weight_seed=case.model.weight_seed ^ 1)
    target = bridged(other, adapter, prepared=case.run.prepared)
    assert source.bridge is not None
    assert target.bridge is not None
    kept = io.BytesIO()
    with at_work("saving and loading a state dict"):
        torch.save(source.bridge.state_dict(), kept)  # type: ignore[no-untyped-call]
        kept.seek(0)
        loaded = torch.load(kept, weights_only=True)
        target.bridge.load_state_dict(loaded)  # type: ignore[no-untyped-call]
    for name, parameter in source.parameters.items():
        due, got = parameter.detach(), target.parameters[name].detach()
        gap = compare_tensors(name, due, got, exactly(due.dtype))
        yield from [gap] if gap else []
    expected = observe(reference(case.model), case, backward=False)
    yield from logits_gap(expected, observe(target, case, backward=False))


@check(
    "copies.cast",
    "bridge.to(dtype), and back, gives what Hugging Face's own cast gives: weights, gradients, "
    "logits, cfg; the mode and what is frozen stay.",
    cases,
    examples=0.2,
)
def cast(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """To the next dtype of the list and back, with a forward after each."""
    case = replace(case, run=replace(case.run, padding="none"))
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    frozen = list(truth.parameters)[case.run.token_seed % len(truth.parameters)]
    for each in (truth, subject):
        observe(each, case, backward=False)  # in the run's mode, which stays
        each.parameters[frozen].requires_grad_(False)
        for parameter in each.parameters.values():
            parameter.grad = parameter.detach() / 3 if parameter.requires_grad else None
    here = case.model.dtype
    there = DTYPES[(DTYPES.index(here) + 1) % len(DTYPES)]
    for name in (there, here):
        dtype = getattr(torch, name)
        truth.model.to(dtype)
        # transformer_lens prints what it does.
        with at_work(f"casting to {name}"), quiet():
            subject.bridge.to(dtype)
        if subject.bridge.cfg.dtype != dtype:
            yield Gap("cfg.dtype", "contract", f"{subject.bridge.cfg.dtype} after .to({dtype})")
        if subject.bridge.training != case.run.training:
            yield Gap("training", "contract", f"{subject.bridge.training} after .to({name})")
        if subject.parameters[frozen].requires_grad:
            yield Gap(frozen, "contract", f"is trained after .to({name})")
        gradients = ({n: p.grad for n, p in s.parameters.items()} for s in (truth, subject))
        for gap in exact_gaps(*gradients):
            yield replace(gap, site=f"gradient of {gap.site} after .to({name})")
        expected = observe(truth, case, backward=False)
        actual = observe(subject, case, backward=False)
        yield from logits_gap(expected, actual, f"logits after .to({name})")
