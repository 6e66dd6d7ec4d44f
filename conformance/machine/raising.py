"""Steps whose hooks raise, forwards or backwards, and contexts that are left by an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from conformance.compare import Gap, bitwise
from conformance.inputs import inputs
from conformance.machine.executor import Machine
from conformance.machine.moves import move
from conformance.machine.running import fires, generated, gradient_seen, has_room
from conformance.observe import observe, options, started
from conformance.points import OnPurposeError
from conformance.spec import Step
from conformance.subjects import SubjectError, at_work


@move("hooks_context", fires)
def hooks_context(machine: Machine, step: Step) -> Iterator[Gap]:
    """One context within another, with the same hook in both; left normally or by an error."""
    case, bridge = machine.probe(step.seed), machine.bridge
    outer, inner = machine.hook_of(step), machine.hook_of(step)
    name = machine.name_of(step.site, step.seed // 2)
    seen = []
    try:
        with at_work("hooks()"), bridge.hooks(fwd_hooks=[(name, machine.function_of(outer))]):
            with bridge.hooks(fwd_hooks=[(name, machine.function_of(inner))]):
                seen.append(observe(machine.subject, case, backward=False).logits)
            seen.append(observe(machine.subject, case, backward=False).logits)
            if step.seed % 2:
                raise OnPurposeError
    except SubjectError as error:
        if not isinstance(error.__cause__, OnPurposeError):
            raise
    for logits, hooks in zip(seen, ((outer, inner), (outer,)), strict=True):
        label = f"logits within {len(hooks)} contexts"
        yield from bitwise(label, machine.expected(case, *hooks).logits, logits)


def _raising(calls: int) -> Callable[..., None]:
    """A hook that raises when it is called for the given time."""
    left = [calls]

    def hook(tensor: torch.Tensor, hook: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise OnPurposeError

    return hook


@move("failing_hook", lambda machine, step: machine.fires(step.site))
def failing_hook(machine: Machine, step: Step) -> Iterator[Gap]:
    """A hook raises: under run_with_hooks, in a context, beside a cache, in mid-generation."""
    case, bridge = machine.probe(step.seed), machine.bridge
    way = step.seed % 4
    tokens, given = inputs(case).tokens, options(machine.subject, case)
    if way == 3 and not has_room(machine, step):
        way = 0
    named: list[Any] = [
        (machine.name_of(step.site, step.seed // 4), _raising(2 if way == 3 else 1))
    ]
    around = torch.no_grad() if machine.state.writes else nullcontext()
    try:
        with at_work("a hook that raises"), started(machine.subject, case), around:
            if way == 0:
                bridge.run_with_hooks(tokens, fwd_hooks=named, **given)
            else:
                with bridge.hooks(fwd_hooks=named):
                    if way == 1:
                        bridge(tokens, **given)
                    elif way == 2:
                        bridge.run_with_cache(tokens, **given)
                    else:
                        generated(machine, tokens, cached=True)
    except SubjectError as error:
        if not isinstance(error.__cause__, OnPurposeError):
            raise
    else:
        yield Gap(step.site, "contract", "the error of a hook did not come out")
    machine.now()  # what it may have left behind shows at sites before it does in logits


@move("failing_backward_hook", gradient_seen)
def failing_backward_hook(machine: Machine, step: Step) -> Iterator[Gap]:
    """A backward hook raises; the gradients that came so far are thrown away, as a user would."""
    case, bridge = machine.probe(step.seed), machine.bridge
    due = step.site in machine.expected(case, looks=True, backward=True).gradients
    name = machine.name_of(step.site, step.seed)
    raised = False
    try:
        with at_work("a backward hook that raises"), bridge.hooks(bwd_hooks=[(name, _raising(1))]):
            observe(machine.subject, case)
    except SubjectError as error:
        inner = error.__cause__
        if not isinstance(
            inner.__cause__ if isinstance(inner, SubjectError) else inner, OnPurposeError
        ):
            raise
        raised = True
    if raised != due:
        yield Gap(step.site, "contract", f"a backward hook {'raised' if raised else 'was silent'}")
    bridge.zero_grad()
    machine.now(gradients={})
