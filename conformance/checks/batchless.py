"""Hooks that are shown one row without its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.interventions import edited_cases
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, in_one_forward
from conformance.compare import Gap, compare_gradients, compare_parameters, compare_values
from conformance.edits import edited
from conformance.inputs import inputs
from conformance.observe import observe, options, sites_of, started
from conformance.recorder import Observation
from conformance.spec import Case
from conformance.subjects import at_work, bridged, reference


@check(
    "interventions.batchless",
    "With remove_batch_dim=True the forward and backward hooks of run_with_hooks are given one "
    "row's tensors without their batch, and what they return takes effect as it does with one.",
    edited_cases,
    examples=0.2,
)
def batchless(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A hook on every site, and a backward hook on all but the LayerNorms' derived ones."""
    case = in_one_forward(replace(case, tokens=case.tokens[:1]), batch=1)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge: Any = bridge_of(subject)
    data, every = inputs(case), sites_of(subject, case)
    plain = {name: site for name, site in every.items() if not site.derived}
    expected = observe(reference(case.model), case, sites=every)
    edits = {edit.site: edit for edit in case.run.edits}
    values: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor, HookPoint], torch.Tensor | None]:
        def hook(row: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
            new = edited(edits[name], row[None]) if name in edits else row[None]
            values[name] = new.detach().clone()
            return new[0] if name in edits else None

        return hook

    def keep_gradient(name: str) -> Callable[[torch.Tensor, HookPoint], None]:
        def hook(row: torch.Tensor, hook: HookPoint) -> None:
            gradients[name] = row[None].detach().clone()

        return hook

    with started(subject, case), at_work("run_with_hooks(remove_batch_dim=True)"):
        logits = bridge.run_with_hooks(
            data.tokens,
            fwd_hooks=[(name, keep(name)) for name in every],
            bwd_hooks=[(name, keep_gradient(name)) for name in plain],
            reset_hooks_end=False,
            remove_batch_dim=True,
            return_type="logits",
            **options(subject, case),
        )
        if logits.requires_grad:
            logits.backward(data.probe.to(logits.dtype))
        bridge.reset_hooks()
    seen = Observation(
        logits.detach(),
        values,
        gradients,
        {name: parameter.grad for name, parameter in subject.parameters.items()},
        tuple(values),
        tuple(gradients),
        expected.random_state,
    )
    yield from compare_values(expected, seen, every)
    yield from compare_gradients(expected, seen, plain)
    yield from compare_parameters(expected, seen)
