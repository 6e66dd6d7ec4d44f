"""Hooks that are shown one row without its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.interventions import edited_cases
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, in_one_forward, sites_to_hook
from conformance.compare import Gap, compare_gradients, compare_parameters, compare_values
from conformance.inputs import inputs
from conformance.observe import observe, options, sites_of, started
from conformance.recorder import Observation, Recorder
from conformance.spec import Case
from conformance.subjects import at_work, bridged, reference


@check(
    "interventions.batchless",
    "With remove_batch_dim=True the forward and backward hooks of run_with_hooks are given one "
    "row's tensors without their batch, once, and what a forward hook returns takes effect.",
    edited_cases,
    examples=0.2,
)
def batchless(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A hook on every site, and a backward hook on all but the LayerNorms' derived ones."""
    case = in_one_forward(case, batch=1)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge: Any = bridge_of(subject)
    data, every = inputs(case), sites_of(subject, case)
    plain = sites_to_hook(subject, case)
    expected = observe(reference(case.model), case, sites=every)
    recorder = Recorder()
    recorder.begin(case)

    def keep(name: str) -> Callable[[torch.Tensor, HookPoint], torch.Tensor | None]:
        def hook(row: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
            new = recorder.edit(name, row[None])
            recorder.value(name, new.detach().clone())
            return new[0] if name in recorder.edits else None

        return hook

    def keep_gradient(name: str) -> Callable[[torch.Tensor, HookPoint], None]:
        def hook(row: torch.Tensor, hook: HookPoint) -> None:
            recorder.gradient(name, row[None].detach().clone())

        return hook

    with started(subject, case), at_work("run_with_hooks(remove_batch_dim=True)"):
        logits = bridge.run_with_hooks(
            data.tokens,
            fwd_hooks=[(name, keep(name)) for name in every],
            bwd_hooks=[(name, keep_gradient(name)) for name in plain],
            reset_hooks_end=False,  # the backward is still to come
            remove_batch_dim=True,
            return_type="logits",
            **options(subject, case),
        )
        if logits.requires_grad:
            logits.backward(data.probe.to(logits.dtype))
        bridge.reset_hooks()
    seen = Observation(
        logits.detach(),
        values=recorder.values,
        gradients=recorder.gradients,
        parameter_gradients={name: p.grad for name, p in subject.parameters.items()},
        fired=tuple(recorder.fired),
        fired_backward=tuple(recorder.fired_backward),
    )
    yield from compare_values(expected, seen, every)
    yield from compare_gradients(expected, seen, plain)
    yield from compare_parameters(expected, seen)
