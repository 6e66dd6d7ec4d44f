"""Ways to run a bridge: train and eval, dropout, checkpointing, autocast, no gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.forked import behind_flags_too
from conformance.checks.forward import logits_gap
from conformance.checks.interventions import edited_runs
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    drawing,
    forward_as_it_is,
    in_one_forward,
    sites_to_hook,
)
from conformance.compare import (
    Gap,
    bitwise,
    compare_gradients,
    compare_parameters,
    compare_values,
    labelled,
)
from conformance.observe import observe, sites_of
from conformance.recorder import Observation, Recorder
from conformance.spec import EDITS, Case, ModelSpec, RunSpec
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import Subject, at_work, bridged, reference

_DROPS = (0.5, 0.1, 0.9, 0.25, 0.37, 0.0625)
DROPS = st.sampled_from(_DROPS)


def dropping_cases() -> SearchStrategy[Case]:
    """Cases in train mode whose attention drops, or would if it did not drop nothing."""
    runs = partial(run_specs, trainings=st.just(True))
    drops = st.sampled_from((*_DROPS, 0.0, 0.0))
    return cases(models=model_specs(dropouts=drops), runs=runs)


def random_gap(expected: Observation, actual: Observation) -> Iterator[Gap]:
    """The gap between the random states after the forwards of two runs, if there is one."""
    assert expected.random_state is not None
    assert actual.random_state is not None
    yield from bitwise("random state", expected.random_state, actual.random_state)


def _stuck(subject: Subject, training: bool) -> Iterator[Gap]:
    """Modules of a bridge, and of the model inside of it, that are not in the mode asked for."""
    assert subject.bridge is not None
    for root in (subject.bridge, subject.model):
        for name, module in root.named_modules():
            if module.training != training and module is not subject.bridge:
                mode = "train" if training else "eval"
                yield Gap(name or type(root).__name__, "contract", f"is not in {mode} mode")


@check(
    "modes.reach",
    "train() and eval(), of a bridge, of the model inside of it or of one block, reach every "
    "module below; eval mode draws no random number and is the same twice.",
    lambda: cases(models=model_specs(dropouts=DROPS)),
    examples=0.15,
)
def reach(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """To train and back by either handle, then one block alone: each with Hugging Face's logits."""
    case = in_one_forward(case)
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    handle = bridge if case.run.token_seed % 2 else subject.model
    block = case.run.token_seed % case.model.num_hidden_layers

    def same(label: str) -> Iterator[Gap]:
        with torch.no_grad():
            for time in ("first", "second"):
                expected, actual = forward_as_it_is(truth, case), forward_as_it_is(subject, case)
                name = f"{label}, {time} forward"
                yield from bitwise(f"{name}: logits", expected[0], actual[0])
                yield from bitwise(f"{name}: random state", expected[1], actual[1])

    for training in (True, False):
        truth.model.train(training)
        handle.train(training)
        mode = "train" if training else "eval"
        yield from labelled(mode, _stuck(subject, training))
        yield from same(mode)
    truth.model.train()
    bridge.train()
    truth.model.model.layers[block].eval()
    bridge.blocks[block].eval()
    yield from same(f"eval of blocks.{block}")


@check(
    "modes.dropout",
    "In train mode attention drops what Hugging Face drops from the same random state, with hooks "
    "on and off, and leaves the random state that Hugging Face leaves.",
    dropping_cases,
    examples=0.25,
)
def dropout(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bare, with everything hooked, and bare again. Beside a hooked bridge, a watched reference."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    everywhere = sites_to_hook(subject, case)
    bare = observe(reference(case.model), case)
    watched = observe(reference(case.model), case, sites=everywhere)
    for label, expected in (("bare", bare), ("hooked", watched), ("bare again", bare)):
        actual = observe(subject, case, sites=everywhere if expected is watched else None)
        yield from labelled(label, logits_gap(expected, actual))
        yield from labelled(label, random_gap(expected, actual))
        yield from labelled(label, compare_parameters(expected, actual))


def checkpointed_cases() -> SearchStrategy[Case]:
    """Cases in train mode, most of which drop, with one edit or none."""

    def chosen(run: RunSpec, on: bool) -> RunSpec:
        # A cache that is given, as the kit gives the reference one, keeps Hugging Face from taking
        # explicit positions for packed sequences. Under checkpointing it makes itself none.
        cached = run.use_cache and run.positions == "derived"
        # Checkpointing makes the embedding's output need a gradient, by a hook of Hugging Face's on
        # that module: before an edit on the reference, after it on a bridge, whose module is more.
        cut = any(edit.site == "embed.hook_out" and edit.kind == "replace" for edit in run.edits)
        edits = run.edits if on and not cut else ()
        return replace(run, training=True, use_cache=cached, chunks=1, edits=edits)

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        return st.builds(chosen, edited_runs(model, most=1), st.booleans())

    return cases(models=model_specs(dropouts=DROPS), runs=runs)


def checkpoint(subject: Subject, case: Case) -> None:
    """Turn gradient checkpointing on, of either kind of PyTorch's."""
    reentrant = bool(case.run.token_seed % 2)
    subject.model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
        {"use_reentrant": reentrant}
    )


@check(
    "modes.checkpointing",
    "Under gradient checkpointing, with and without an edit, what is computed again is what was "
    "computed first, dropout included: values, gradients and the hooks that fire again are the "
    "reference's.",
    checkpointed_cases,
    examples=0.4,
)
def checkpointing(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Of a hook that fires twice the second value is compared. Bare, too, if there is no edit."""
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    checkpoint(truth, case)
    with at_work("turning gradient checkpointing on"):
        checkpoint(subject, case)
    if not case.run.edits:
        expected, actual = observe(truth, case), observe(subject, case)
        yield from labelled("bare", logits_gap(expected, actual))
        yield from labelled("bare", compare_parameters(expected, actual))
    # Hugging Face takes the cache away from a checkpointed layer, and with it our tap of the keys.
    case = replace(case, run=replace(case.run, use_cache=False))
    every, plain = sites_of(subject, case), sites_to_hook(subject, case)
    expected, actual = observe(truth, case, sites=every), observe(subject, case, sites=plain)
    once = replace(actual, fired=tuple(dict.fromkeys(actual.fired)))
    yield from compare_values(expected, once, every)
    yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)
    yield from random_gap(expected, actual)
    due, got = Counter(expected.fired), Counter(actual.fired)
    for name in every:
        if due[name] != got[name]:
            told = f"fired {got[name]} times where Hugging Face computes it {due[name]} times"
            yield Gap(name, "count", told)


class _Casting(Recorder):
    """Notes whether autocast is on in each site's hooks, and to which dtype."""

    def begin(self, case: Case) -> None:
        """Forget the last run."""
        super().begin(case)
        self.casts: dict[str, tuple[bool, torch.dtype]] = {}

    def value(self, name: str, tensor: torch.Tensor) -> None:
        """As a recorder does."""
        self.casts[name] = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        super().value(name, tensor)


@check(
    "modes.autocast",
    "Under torch.autocast, in a short dtype, every value, dtype and gradient is Hugging Face's, "
    "bit for bit, of models of every dtype, hooked or not, and hooks run under it too; edits "
    "behind flags have the effect of a computation from scratch.",
    lambda: cases(
        models=model_specs(
            dtypes=st.sampled_from(("float32",) * 3 + ("bfloat16", "float16", "float64"))
        )
    ),
    examples=0.4,
)
def autocast(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """In bfloat16, as is usual on a CPU, or in float16."""
    if case.model.tie_word_embeddings:
        # Of a tied weight autocast keeps one short copy for all chunks. Its gradient is a third
        # beside those of the embedding of each chunk, and nothing says which two are added first.
        case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every, plain = sites_of(subject, case), sites_to_hook(subject, case)
    short = torch.float16 if case.run.token_seed % 3 == 0 else torch.bfloat16
    with torch.autocast("cpu", short):
        due, bare = observe(reference(case.model), case), observe(subject, case)
        expected = observe(reference(case.model), case, sites=every)
        actual = observe(subject, case, sites=plain, recorder=(hooks := _Casting()))
        yield from behind_flags_too(adapter, subject, case, dtype=short)
    for name, seen in hooks.casts.items():
        if seen != (True, short):
            yield Gap(name, "contract", f"its hooks run with autocast {seen}")
    yield from compare_values(expected, actual, every)
    if case.run.chunks == 1:
        yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)
    yield from labelled("bare", logits_gap(due, bare))
    yield from labelled("bare", compare_parameters(due, bare))


def inferring_cases() -> SearchStrategy[Case]:
    """Cases with edits, most of them in place: only here may the tensor be a neighbour's too."""
    kinds = ("in_place",) * 3 * len(EDITS) + EDITS
    return cases(runs=lambda model: edited_runs(model, kinds=kinds, most=4))


@check(
    "modes.inference",
    "Under torch.inference_mode every value is the reference's, edits in place included, and that "
    "of a computation from scratch where edits are behind flags; a training step after it has the "
    "reference's gradients, whatever torch's default dtype is then.",
    inferring_cases,
    examples=0.35,
)
def inference(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """What inference mode made may not be kept: no gradient can be taken through it."""
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    with torch.inference_mode():
        expected = observe(truth, case, sites=every, backward=False)
        actual = observe(subject, case, sites=every, backward=False)
        yield from compare_values(expected, actual, every)
        yield from behind_flags_too(adapter, subject, case, backward=False)
    plain = replace(case, run=replace(case.run, edits=()))
    before = torch.get_default_dtype()
    default = (before, torch.float64, torch.bfloat16)[drawing(case)(3)]
    torch.set_default_dtype(default)
    try:
        expected, actual = observe(truth, plain), observe(subject, plain)
    finally:
        torch.set_default_dtype(before)
    label = f"afterwards, with {default} by default"
    yield from labelled(label, logits_gap(expected, actual))
    yield from labelled(label, compare_parameters(expected, actual))
