"""Nothing that a bridge advertises is dead, and what is asked of Hugging Face's call is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from conformance.checks.registry import Adapter, check
from conformance.checks.support import turn
from conformance.compare import Gap, compare_tensors
from conformance.hooking import hook_points
from conformance.inputs import inputs
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly

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
    "output_attentions=True returns every layer's pattern, Hugging Face's own.",
    cases,
    examples=0.2,
)
def output_attentions(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Asked of the wrapped model, as run_with_cache and Hugging Face users do."""
    tokens = inputs(case).tokens
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    with torch.no_grad():
        expected = reference(case.model).model(tokens, output_attentions=True).attentions
        assert subject.bridge is not None
        with at_work("output_attentions=True"):
            model = subject.bridge.original_model
            actual = model(tokens, output_attentions=True).attentions or ()
    if len(actual) != len(expected):
        yield Gap("attentions", "count", f"{len(actual)} layers instead of {len(expected)}")
        return
    for block, (due, got) in enumerate(zip(expected, actual, strict=True)):
        gap = compare_tensors(f"attentions[{block}]", due, got, exactly(due.dtype))
        yield from [gap] if gap else []
