"""Nothing that a bridge advertises is dead, and what is asked of Hugging Face's call is given."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    blaming,
    bridge_of,
    drawing,
    exact_gaps,
    in_one_forward,
    quiet,
    turn,
)
from conformance.compare import Gap, bitwise
from conformance.inputs import inputs
from conformance.observe import arguments, started
from conformance.points import hook_points
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference

# Flags that cannot be on together are in different settings.
SETTINGS = (
    (),
    ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"),
    ("use_attn_in",),
)


def _fired(subject: Subject, case: Case) -> set[str]:
    """Names of the hook points that a forward fires."""
    assert subject.bridge is not None
    seen: set[str] = set()
    points = hook_points(subject)
    for name, point in points.items():
        point.add_hook(lambda tensor, hook, name=name: seen.add(name))
    try:
        with torch.no_grad(), at_work("a forward"):
            subject.bridge(inputs(case).tokens, return_type="logits")
    finally:
        for point in points.values():
            point.remove_hooks("both")
    return seen


@check(
    "alive.advertised",
    "Every name in hook_dict fires in a plain forward, or under a flag, or is not there; under a "
    "flag no hook that fires without it goes silent.",
    cases,
    examples=0.1,
)
def advertised(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A plain forward, then every flag."""
    case = replace(case, run=replace(case.run, padding="none", positions="derived"))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    ever: set[str] = set()
    plain: set[str] = set()
    for flags in SETTINGS:
        turn(subject, flags, True)
        fired = _fired(subject, case)
        turn(subject, flags, False)
        plain = plain or fired
        ever |= fired
        for name in sorted(plain - fired):
            yield Gap(name, "missing", f"goes silent under {' and '.join(flags)}")
    for name in hook_points(subject):
        if name not in ever:
            yield Gap(name, "missing", "advertised in hook_dict, but no forward fires it")


@check(
    "alive.output_attentions",
    "output_attentions=True returns every layer's pattern, Hugging Face's own, dropout, gradient "
    "and all, as the hooks of hook_pattern have left it, in compatibility mode too.",
    cases,
    examples=0.3,
)
def output_attentions(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Asked of the wrapped model, as run_with_cache and Hugging Face users do."""
    case = in_one_forward(case)
    truth, subject = reference(case.model), bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = bridge_of(subject)
    expected = yield from _recorded(truth, subject, case, "attentions")
    if not expected:
        return
    block = case.run.token_seed % len(expected)

    def halve(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return tensor * 0.5

    with bridge.hooks(fwd_hooks=[(f"blocks.{block}.attn.hook_pattern", halve)]):
        edited = record(subject, truth, case, "attentions")
    due = expected[block].detach() * 0.5
    yield from bitwise(f"attentions[{block}], edited", due, edited[block].detach())
    if drawing(case)(3) == 0:
        yield from _processed_gaps(truth, subject, case)


def _processed_gaps(truth: Subject, subject: Subject, case: Case) -> Iterator[Gap]:
    """In compatibility mode the attentions are what hook_pattern shows there, of every layer."""
    bridge = bridge_of(subject)
    shown: dict[str, torch.Tensor] = {}
    with at_work("enable_compatibility_mode"), quiet():
        bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)

    def show(tensor: torch.Tensor, hook: HookPoint) -> None:
        shown[str(hook.name)] = tensor.detach()

    names = [f"blocks.{block}.attn.hook_pattern" for block in range(len(bridge.blocks))]
    with bridge.hooks(fwd_hooks=[(name, show) for name in names]):
        given = record(subject, truth, case, "attentions")
    got = dict(zip(names, (tensor.detach() for tensor in given), strict=False))
    for gap in exact_gaps(shown, got):
        yield replace(gap, site=f"attentions in compatibility mode: {gap.site}")


@check(
    "alive.hidden_states",
    "output_hidden_states=True returns the residual stream before every block and the last one's "
    "after ln_final, Hugging Face's own, gradient and all, as the hooks after a block leave it.",
    cases,
    examples=0.2,
)
def hidden_states(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Asked of the wrapped model, like the attentions."""
    case = in_one_forward(case)
    truth, subject = reference(case.model), bridged(case.model, adapter, prepared=case.run.prepared)
    expected = yield from _recorded(truth, subject, case, "hidden_states")
    if not expected:
        return
    block, left = case.run.token_seed % (len(expected) - 1), []

    def halve(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        left.append(tensor.detach() * 0.5)
        return left[-1]

    with bridge_of(subject).hooks(fwd_hooks=[(f"blocks.{block}.hook_out", halve)]):
        edited = record(subject, truth, case, "hidden_states")
    if block + 2 < len(expected):  # what follows the last block is shown after ln_final
        (due,) = left
        yield from bitwise(f"hidden_states[{block + 1}], edited", due, edited[block + 1].detach())


def record(asked: Subject, truth: Subject, case: Case, name: str) -> list[torch.Tensor]:
    """What Hugging Face's call returns under a name where it is asked for it."""
    given = {**arguments(truth, case), f"output_{name}": True}
    with started(asked, case), blaming(asked, f"output_{name}=True"):
        return list(getattr(asked.model(**given), name) or ())


def _recorded(
    truth: Subject, subject: Subject, case: Case, name: str
) -> Generator[Gap, None, list[torch.Tensor]]:
    """The gaps of a record and its gradient; returns the reference's, or none if numbers differ."""
    expected, actual = (record(asked, truth, case, name) for asked in (truth, subject))
    if len(actual) != len(expected):
        yield Gap(name, "count", f"{len(actual)} layers instead of {len(expected)}")
        return []
    for at, (due, got) in enumerate(zip(expected, actual, strict=True)):
        yield from bitwise(f"{name}[{at}]", due.detach(), got.detach())
    due_gradients = _gradients_of(truth, expected)
    with at_work(f"a gradient of output_{name}=True"):
        got_gradients = _gradients_of(subject, actual)
    for gap in exact_gaps(due_gradients, got_gradients):
        told = name.replace("_", " ")
        yield replace(gap, site=f"gradient of the {told}: {gap.site}", kind="gradient")
    return expected


def _gradients_of(subject: Subject, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """What an equal sum of all tensors but their first columns sends to each parameter."""
    total = sum(tensor[..., 1:].sum() for tensor in tensors)
    names = list(subject.parameters)
    asked = list(subject.parameters.values())
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return dict.fromkeys(names)
    found = torch.autograd.grad(total, asked, allow_unused=True)
    return dict(zip(names, found, strict=True))
