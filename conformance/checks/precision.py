"""Low precision, and forwards without a cache: where upstream crashes or rounds elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformers import DynamicCache

from conformance.checks import gradients
from conformance.checks.forked import is_exact
from conformance.checks.gates import FORKS
from conformance.checks.hooking import some_sites
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, in_one_forward, turn
from conformance.compare import Gap, compare_parameters, compare_tensors, compare_values, labelled
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.recorder import Observation, Recorder
from conformance.sites import behind_flags
from conformance.spec import DTYPES, Case, Edit, ModelSpec
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, SubjectError, at_work, bridged, reference
from conformance.tolerance import exactly

# With such weights what is written to the residual stream is too great for float16, here and there
# or everywhere. Behind an infinite entry comes a LayerNorm whose output is NaN.
_OVERFLOWING = (8.0, 20.0, 60.0)


def short_models() -> SearchStrategy[ModelSpec]:
    """Models in bfloat16 and float16. Half of the latter overflow."""

    def rescaled(model: ModelSpec, scale: float) -> ModelSpec:
        overflows = scale > 0 and model.dtype == "float16"
        return replace(model, weight_scale=scale) if overflows else model

    plain = model_specs(dtypes=st.sampled_from(("bfloat16", "float16")))
    return st.builds(rescaled, plain, st.sampled_from((0.0,) * 3 + _OVERFLOWING))


def short_cases() -> SearchStrategy[Case]:
    """Cases of `short_models`."""
    return cases(models=short_models())


@check(
    "precision.everywhere",
    "In bfloat16 and float16 every value, dtype and gradient is Hugging Face's bit for bit, with "
    "and without a cache, infinities and NaN of an overflow included, also where a hook looks at "
    "what each head reads.",
    short_cases,
    examples=0.5,
)
def everywhere(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The whole comparison, on short dtypes only."""
    yield from gradients.everywhere.run(adapter, case)
    if case.model.weight_scale in _OVERFLOWING and is_exact(adapter):
        yield from _looked_at(adapter, case)


def _looked_at(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """What looking at each head's copy of the residual stream changes: of NaN, too, nothing."""
    flags = FORKS[1 + drawing(case)(len(FORKS) - 1)]
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every, gates = sites_of(subject, case), behind_flags(case.model, flags)
    expected = observe(reference(case.model), case, sites=every, backward=False)
    turn(subject, flags, True)
    actual = observe(subject, case, sites=every, backward=False)

    def of_all(name: str) -> bool:
        return name.partition("#")[0] not in gates

    values = {name: value for name, value in actual.values.items() if of_all(name)}
    plain = replace(actual, values=values, fired=tuple(filter(of_all, actual.fired)))
    yield from labelled(f"under {flags}", compare_values(expected, plain, every))


@check(
    "precision.no_cache",
    "A forward without a cache, by argument, by configuration or by gradient checkpointing in "
    "training, gives the reference's logits and gradients in every dtype.",
    cases,
    examples=0.3,
)
def no_cache(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three ways of having no cache, each on fresh subjects."""
    run = replace(case.run, use_cache=False, chunks=1)
    plain = replace(case, run=run)

    def by_configuration(subject: Subject) -> None:
        subject.model.config.use_cache = False

    def by_checkpointing(subject: Subject) -> None:
        subject.model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            {"use_reentrant": False}
        )

    ways: dict[str, tuple[Case, Callable[[Subject], None]]] = {
        "use_cache=False": (plain, lambda subject: None),
        "config.use_cache=False": (plain, by_configuration),
        "checkpointing": (replace(plain, run=replace(run, training=True)), by_checkpointing),
    }
    for name, (its_case, prepare) in ways.items():
        truth = reference(its_case.model)
        subject = bridged(its_case.model, adapter, prepared=run.prepared)
        prepare(truth)
        with at_work(name):
            prepare(subject)
        expected, actual = observe(truth, its_case), observe(subject, its_case)
        logits, dtype = f"{name}: logits", expected.logits.dtype
        gap = compare_tensors(logits, expected.logits, actual.logits, exactly(dtype))
        yield from [gap] if gap else []
        yield from compare_parameters(expected, actual)


@check(
    "precision.cache",
    "The key-value cache of a bridged model holds the reference's keys and values, in the model's "
    "dtype.",
    cases,
    examples=0.3,
)
def cache(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """What a cache given to the forward holds after it."""
    case = replace(case, run=replace(case.run, positions="derived", padding="none"))
    tokens = inputs(case).tokens

    def cached(subject: Subject) -> list[Any]:
        kept = DynamicCache(config=subject.model.config)
        model = subject.bridge if subject.bridge is not None else subject.model
        with torch.no_grad():
            model(tokens, past_key_values=kept, use_cache=True)
        return list(kept.layers)

    expected = cached(reference(case.model))
    with at_work("filling a cache"):
        actual = cached(bridged(case.model, adapter, prepared=case.run.prepared))
    for index, (due, got) in enumerate(zip(expected, actual, strict=True)):
        for name in ("keys", "values"):
            tensor = getattr(due, name)
            label = f"cache.{index}.{name}"
            gap = compare_tensors(label, tensor, getattr(got, name), exactly(tensor.dtype))
            yield from [gap] if gap else []


class _Cast(Recorder):
    """Leaves half of a site's tensor in another dtype, or cast to that and back."""

    def __init__(self, site: str, dtype: torch.dtype, *, back: bool = False) -> None:
        self.site, self.dtype, self.back = site, dtype, back

    def begin(self, case: Case) -> None:
        """Edit the site."""
        super().begin(case)
        self.edits = {self.site: Edit(site=self.site)}

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or what is left of it if it is the site's: halving rounds nothing."""
        if name != self.site:
            return tensor
        cast = (tensor / 2).to(self.dtype)
        return cast.to(tensor.dtype) if self.back else cast


@check(
    "precision.returned",
    "What a hook returns in another dtype than it was given has the effect that such a tensor, or "
    "the same one cast back, has in Hugging Face's model, or is an error as it is there, or one "
    "that names the hook: it is not passed over.",
    cases,
    examples=0.4,
)
def returned(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One site, cast to a drawn dtype. In most cases Hugging Face's next product is an error."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every, draw = sites_of(subject, case), drawing(case)
    # Not behind the clamp: what Hugging Face clamps in place keeps its dtype.
    (site,) = some_sites(replace(subject, optional_hooks=()), case, 1)
    name = [each for each in DTYPES if each != case.model.dtype][draw(3)]
    dtype = getattr(torch, name)

    def seen(its: Subject, *, back: bool = False) -> Observation:
        recorder = _Cast(site, dtype, back=back)
        shown = observe(its, case, sites=every, backward=False, recorder=recorder)
        # Of the site itself each shows what it returned.
        return replace(shown, values={**shown.values, site: shown.values[site].to(dtype)})

    expected = [seen(reference(case.model), back=True)]
    with suppress(RuntimeError):
        expected.append(seen(reference(case.model)))
    try:
        actual = seen(subject)
    except SubjectError as error:
        if len(expected) == 1 or site in str(error):
            return
        raise
    told = f"{site} in {name}"
    gaps = [list(labelled(told, compare_values(due, actual, every))) for due in expected]
    yield from min(gaps, key=len)
