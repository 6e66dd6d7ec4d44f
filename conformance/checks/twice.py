"""More than one backward through what one forward has left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, in_one_forward, sites_to_hook
from conformance.compare import Gap, compare_gradients, compare_parameters
from conformance.inputs import inputs
from conformance.observe import observe, options, started
from conformance.recorder import Observation
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference


def _backward(subject: Subject, logits: torch.Tensor, seed: torch.Tensor) -> Observation:
    """The parameters' gradients of one backward; keeps the graph and clears the gradients."""
    logits.backward(seed, retain_graph=True)  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in subject.parameters.items()}
    for parameter in subject.parameters.values():
        parameter.grad = None
    return Observation(logits.detach(), parameter_gradients=found)


@check(
    "gradients.twice",
    "A second backward through one forward gives every gradient and fires every backward hook as "
    "the first did, also where another forward and backward came between.",
    cases,
    examples=0.2,
)
def twice(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Two backwards of one forward, and between them a run of fewer tokens."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, data, sites = bridge_of(subject), inputs(case), sites_to_hook(subject, case)
    expected = observe(reference(case.model), case, sites=sites)
    seen: list[tuple[str, torch.Tensor]] = []

    def recorder(name: str) -> Callable[[torch.Tensor, HookPoint], None]:
        return lambda gradient, hook: seen.append((name, gradient.detach().clone()))

    hooks = [(name, recorder(name)) for name in sites]
    with bridge.hooks(bwd_hooks=hooks), started(subject, case), at_work("two backwards"):
        logits = bridge(data.tokens, return_type="logits", **options(subject, case))
        between = bridge(data.tokens[:1, :1], return_type="logits")
        for when in ("first", "second"):
            seen.clear()
            found = _backward(subject, logits, data.probe.to(logits.dtype))
            fired = tuple(name for name, _ in seen)
            its = replace(found, gradients=dict(seen), fired_backward=fired)
            for gap in (
                *compare_gradients(expected, its, sites),
                *compare_parameters(expected, its),
            ):
                yield replace(gap, site=f"{when}: {gap.site}")
            _backward(subject, between, torch.ones_like(between))
