"""Nothing that a bridge advertises is dead, and what is asked of Hugging Face's call is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.compare import Gap, compare_tensors
from conformance.inputs import inputs
from conformance.observe import hook_points, observe
from conformance.spec import Case
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly, of_sum_by_head

# Flags that cannot be on together are in different settings.
SETTINGS = (
    (),
    ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"),
    ("use_attn_in",),
)


@contextmanager
def _set(subject: Subject, flags: tuple[str, ...]) -> Iterator[None]:
    """Turn flags on for a forward, and off after it."""
    with at_work(f"a forward under {' and '.join(flags) or 'no flag'}"):
        for flag in flags:
            getattr(subject.bridge, f"set_{flag}")(True)
        yield
        for flag in flags:
            getattr(subject.bridge, f"set_{flag}")(False)


def _fired(subject: Subject, case: Case) -> set[str]:
    """Names of the hook points that a forward fires."""
    assert subject.bridge is not None
    seen: set[str] = set()
    points = hook_points(subject)
    for name, point in points.items():
        point.add_hook(lambda tensor, hook, name=name: seen.add(name))
    try:
        with torch.no_grad():
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
        with _set(subject, flags):
            fired = _fired(subject, case)
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


def wide_cases() -> SearchStrategy[Case]:
    """Cases in the dtypes in which summing per head is within the allowance of one product."""
    return cases(models=model_specs(dtypes=st.sampled_from(("float32", "float64"))))


@check(
    "alive.flags",
    "A flag that splits inputs or results by head changes neither logits nor gradients, biases "
    "included.",
    wide_cases,
    examples=0.3,
)
def flags(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Under every setting of the flags, against the reference, which knows none of them."""
    expected = observe(reference(case.model), case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    for setting in SETTINGS[1:]:
        with _set(subject, setting):
            actual = observe(subject, case)
        pairs = {"logits": (expected.logits, actual.logits)}
        for name, due in expected.parameter_gradients.items():
            got = actual.parameter_gradients[name]
            if due is not None and got is not None:
                pairs[name] = (due, got)
            elif due is not got:
                yield Gap(f"{name} under {setting}", "missing", "a gradient on one side only")
        for name, (due, got) in pairs.items():
            allowance = of_sum_by_head(due)
            gap = compare_tensors(f"{name} under {setting}", due, got, allowance)
            yield from [gap] if gap else []
