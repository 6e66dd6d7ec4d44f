"""Logits and loss: what comes out of a forward with no hook on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from conformance.checks.registry import Adapter, check
from conformance.checks.support import has_exact, needs_patch, within_clip
from conformance.compare import Gap, compare_tensors
from conformance.inputs import inputs
from conformance.observe import observe
from conformance.recorder import Observation
from conformance.spec import Case
from conformance.strategies import cases, clipped_cases
from conformance.subjects import (
    Subject,
    at_work,
    bridged,
    make_adapter,
    patched,
    reference,
)
from conformance.tolerance import exactly, of_loss


def logits_gap(expected: Observation, actual: Observation, name: str = "logits") -> Iterator[Gap]:
    """The gap between the logits of two observations, if there is one."""
    allowance = exactly(expected.logits.dtype)
    gap = compare_tensors(name, expected.logits, actual.logits, allowance)
    yield from [gap] if gap else []


@check("forward.logits", "The bridged model's logits are the reference's, bit for bit.", cases)
def logits(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bare forward of both, no hook on either."""
    expected = observe(reference(case.model), case, backward=False)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    yield from logits_gap(expected, observe(subject, case, backward=False))


@check(
    "forward.loss",
    "The bridged model's loss is Hugging Face's over the same pairs of real tokens.",
    cases,
    examples=0.3,
)
def loss(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A pair counts where both of its tokens are attended: transformer_lens' convention."""
    run = replace(case.run, chunks=1, training=False)
    case = replace(case, run=run)
    data = inputs(case)
    mask = data.attention_mask
    labels = data.tokens.clone()
    if mask is not None:
        labels[:, 1:][(mask[:, :-1] == 0) | (mask[:, 1:] == 0)] = -100
    if case.run.seq_len == 1 or bool((labels[:, 1:] == -100).all()):
        return  # no pair, no loss: 0 / 0 on both sides
    plain = reference(case.model)
    given: dict[str, Any] = {"use_cache": run.use_cache}
    with torch.no_grad():
        expected_logits = observe(plain, case, backward=False).logits
        expected = plain.model.loss_function(
            logits=expected_logits, labels=labels, vocab_size=case.model.vocab_size
        )
        subject = bridged(case.model, adapter, prepared=run.prepared)
        assert subject.bridge is not None
        if data.position_ids is not None:
            given["position_ids"] = data.position_ids
        with at_work("computing the loss"):
            actual = subject.bridge(data.tokens, return_type="loss", attention_mask=mask, **given)
    # transformer_lens keeps the loss in the logits' dtype, Hugging Face gives it in float32.
    actual = actual.to(expected.dtype)
    gap = compare_tensors("loss", expected, actual, of_loss(expected_logits.dtype))
    yield from [gap] if gap else []


@check(
    "forward.patched",
    "A patched model's logits are the reference's without its clamp, and the reference's own "
    "wherever no entry exceeds the clip.",
    cases,
    examples=0.5,
)
def patched_default(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """``prepare_model(hf_model)`` as documented: the clamp is skipped."""
    needs_patch(adapter)
    model = case.model
    actual = observe(patched(model, adapter), case, backward=False)
    without = reference(model.without_clip())
    yield from logits_gap(observe(without, case, backward=False), actual, "logits without clip")
    if model.clip_qkv is not None and within_clip(case):
        expected = observe(reference(model), case, backward=False)
        yield from logits_gap(expected, actual, "logits, no entry above the clip")


@check(
    "forward.patched_exact",
    "A model patched with exact_clip=True gives the reference's logits, clamp and all.",
    cases,
    examples=0.5,
)
def patched_exact(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """``prepare_model(hf_model, exact_clip=True)``."""
    needs_patch(adapter, exact=True)
    expected = observe(reference(case.model), case, backward=False)
    actual = observe(patched(case.model, adapter, exact_clip=True), case, backward=False)
    yield from logits_gap(expected, actual)


@check(
    "forward.patch_warning",
    "A model patched by default says once that its clamp is skipped, with the clip and the way to "
    "keep it, each model for itself and no more when it is patched again; one patched exactly or "
    "bridged never does.",
    clipped_cases,
    examples=0.1,
)
def patch_warning(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Two models, each run twice, patched again and run again; then the silent ones."""
    needs_patch(adapter)

    def warned(act: Callable[[], object]) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            act()
        texts = [str(warning.message) for warning in seen]
        return [text for text in texts if "clip" in text or "clamp" in text]

    def build(exact: bool | None = None) -> Subject:
        return patched(case.model, adapter, exact_clip=exact)

    def watch(subject: Subject) -> list[str]:
        return warned(partial(observe, subject, case))

    words = [str(case.model.clip_qkv), *(["exact_clip=True"] if has_exact(adapter) else [])]
    for which in ("patched forward", "patched forward of a second model"):
        built: list[Subject] = []
        if said := warned(lambda: built.append(build())):  # noqa: B023 - called at once
            yield Gap("prepare_model", "contract", f"warned before any forward: {said[0]}")
        (subject,) = built
        said = [*watch(subject), *watch(subject)]
        if len(said) != 1:
            yield Gap(which, "contract", f"warned {len(said)} times in two forwards")
        for text in said:
            if missing := [word for word in words if word not in text]:
                told = f"the warning does not say {', '.join(missing)}: {text}"
                yield Gap(which, "contract", told)
        again = make_adapter(adapter, subject.model)
        with at_work("patching again"):
            again.prepare_model(subject.model)
        if said := watch(subject):
            yield Gap(f"{which}, again", "contract", f"warned once more: {said[0]}")
    silent = {"bridged": bridged(case.model, adapter, prepared=True)}
    if has_exact(adapter):
        silent["exactly patched"] = build(exact=True)
    for kind, subject in silent.items():
        if said := watch(subject):
            yield Gap(f"{kind} forward", "contract", f"warned: {said[0]}")
