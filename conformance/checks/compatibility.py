"""Compatibility mode: processed weights must not change what the model says."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import combinations

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens.model_bridge import TransformerBridge
from transformers import OlmoForCausalLM
from transformers.activations import ACT2FN

from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.relations import WIDE, nudged, underived
from conformance.checks.support import bridge_of, drawing, in_one_forward
from conformance.compare import Gap, compare_tensors
from conformance.inputs import inputs
from conformance.observe import arguments, observe, sites_of
from conformance.sites import observable
from conformance.spec import PADDINGS, PROCESSING, Case, ModelSpec, RunSpec
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import PROCESSED_NUDGES, of_log_probabilities, of_rounding
from conformance.verdict import NotApplicable

ACTIVATIONS = ("silu", *sorted(set(ACT2FN) - {"silu"}))


def processed_runs(
    model: ModelSpec, paddings: tuple[str, ...] = PADDINGS
) -> SearchStrategy[RunSpec]:
    """Runs in eval mode with any set of processing."""
    # Every set at once, for Hypothesis makes near-copies of draws that are alike.
    sets = [some for size in range(len(PROCESSING) + 1) for some in combinations(PROCESSING, size)]
    asked = st.sampled_from(sets)
    padded = st.sampled_from(paddings)
    drawn = run_specs(
        model, paddings=padded, trainings=st.just(False), positions=st.just("derived")
    )
    return st.builds(lambda run, flags: replace(run, processing=flags), drawn, asked)


def processed_cases(paddings: tuple[str, ...] = PADDINGS) -> SearchStrategy[Case]:
    """Float32 cases with every activation that Hugging Face knows and any set of processing."""
    models = model_specs(dtypes=st.just("float32"), activations=st.sampled_from(ACTIVATIONS))
    return cases(models=models, runs=partial(processed_runs, paddings=paddings))


def process(subject: Subject, case: Case) -> list[str]:
    """Turn compatibility mode on with the case's processing; the warnings that it gave."""
    assert subject.bridge is not None
    flags = {name: name in case.run.processing for name in PROCESSING}
    order = signature(TransformerBridge.enable_compatibility_mode).parameters
    places = [flags.get(name, name == "disable_warnings") for name in order if name != "self"]
    stage = at_work(f"enable_compatibility_mode({case.run.processing})")
    with stage, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if case.run.token_seed // 32 % 3:
            subject.bridge.enable_compatibility_mode(disable_warnings=True, **flags)
        else:
            subject.bridge.enable_compatibility_mode(*places)
    return [str(warning.message) for warning in seen]


def log_probabilities_of(logits: torch.Tensor, case: Case) -> torch.Tensor:
    """Log-probabilities at real tokens ``[token, d_vocab]``: centering shifts logits as a whole."""
    mask = inputs(case).attention_mask
    chosen = logits if mask is None else logits[mask.bool()]
    return chosen.log_softmax(-1)


def probability_gaps(
    name: str, due: torch.Tensor, got: torch.Tensor, truth: Subject, case: Case
) -> Iterator[Gap]:
    """The gap between log-probabilities before and after weights were processed, if there is one.

    Args:
        name: What the gap is called.
        due: The reference's.
        got: The bridge's.
        truth: The reference, which is run again, its numbers nudged, where other roundings of this
            very model may be all there is.
        case: What it runs.
    """
    gap = compare_tensors(name, due, got, of_log_probabilities())
    if gap is not None and truth.model.dtype in WIDE:
        sites = underived(observable(case.model))
        runs = observe(truth, case, backward=False), *nudged(truth, case, sites)
        plain, *moved = (log_probabilities_of(run.logits, case) for run in runs)
        gap = compare_tensors(name, due, got, of_rounding(plain, moved, PROCESSED_NUDGES))
    yield from [gap] if gap else []


@check(
    "compatibility.log_probabilities",
    "Compatibility mode, with any set of weight processing but the refactoring of QK that rotary "
    "forbids, leaves the log-probabilities of every real token as they are.",
    processed_cases,
)
def log_probabilities(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """With and without biases, clip and grouped heads, for every activation."""
    truth = reference(case.model)
    expected = observe(truth, case, backward=False)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    process(subject, case)
    actual = observe(subject, case, backward=False)
    due = log_probabilities_of(expected.logits, case)
    got = log_probabilities_of(actual.logits, case)
    yield from probability_gaps("log-probabilities", due, got, truth, case)


def _without_first(model: OlmoForCausalLM) -> None:
    """Take the value bias of the first block away."""
    model.model.layers[0].self_attn.v_proj.bias = None


@check(
    "compatibility.value_biases",
    "A value bias is folded away wherever that is legal; where a clamp forbids it, or a dropout in "
    "train mode, a warning says why, though the first block has none.",
    lambda: cases(
        models=model_specs(
            dtypes=st.just("float32"),
            biases=st.sampled_from((("v",), ("v", "o"), tuple("qkvo"))),
            # Whether a clip binds is not known beforehand.
            clips=st.sampled_from((None, None, 0.5, 100.0)),
            dropouts=st.sampled_from((0.0, 0.5, 0.1)),
        ),
        runs=partial(run_specs, trainings=st.sampled_from((False, True, True))),
    ),
    examples=0.4,
)
def value_biases(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Legal is: no clamp between the bias and its use, no dropout on the pattern."""
    if "v" not in case.model.biases:
        raise NotApplicable("the model has no value bias")
    run = replace(case.run, processing=("fold_value_biases",))
    case = replace(case, run=run)
    layers = case.model.num_hidden_layers
    uneven = layers > 1 and drawing(case)(3) > 0
    alter = _without_first if uneven else None
    subject = bridged(case.model, adapter, prepared=run.prepared, alter=alter)
    bridge_of(subject).train(run.training)
    said = process(subject, case)
    assert subject.bridge is not None
    dropping = run.training and case.model.attention_dropout > 0
    legal = case.model.clip_qkv is None and not dropping
    for block in range(uneven, layers):
        name = f"blocks.{block}.attn.b_V"
        bias = subject.bridge.blocks[block].attn.b_V
        zero = bias is None or not bool(bias.any())
        if legal != zero:
            past = "dropout" if case.model.clip_qkv is None else "a clamp"
            state = "not folded though nothing forbids it" if legal else f"folded past {past}"
            yield Gap(name, "contract", state)
    reason = "attention_dropout" if case.model.clip_qkv is None else "clip_qkv"
    if not legal and not [text for text in said if reason in text]:
        yield Gap("warnings", "contract", f"no warning names {reason} as the reason")


@check(
    "compatibility.refusal",
    "Refactoring QK is refused with an error that leaves the bridge untouched; a later legal call "
    "works.",
    processed_cases,
    examples=0.1,
)
def refusal(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bit for bit the same before and after the refusal, then processed as if it never was."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    before = observe(subject, case, backward=False)
    try:
        subject.bridge.enable_compatibility_mode(refactor_factored_attn_matrices=True)
    except Exception as error:
        if not str(error):
            yield Gap("refactor_factored_attn_matrices", "contract", "refused without a word")
    else:
        yield Gap("refactor_factored_attn_matrices", "contract", "was not refused")
        return
    yield from logits_gap(before, observe(subject, case, backward=False), "logits after a refusal")
    process(subject, case)
    after = observe(subject, case, backward=False)
    due = log_probabilities_of(before.logits, case)
    got = log_probabilities_of(after.logits, case)
    yield from probability_gaps("log-probabilities", due, got, reference(case.model), case)


@check(
    "compatibility.hooks",
    "In compatibility mode every hook of a plain forward still fires exactly once.",
    processed_cases,
    examples=0.2,
)
def hooks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Counted at each hook point; its aliases are other names of the same."""
    case = replace(case, run=replace(case.run, chunks=1))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    process(subject, case)
    assert subject.bridge is not None
    fired: Counter[str] = Counter()
    # By the names of hook_dict: a hook point's own name is a legacy one in this mode.
    points, wanted = subject.bridge.hook_dict, sites_of(subject, case)
    for name in wanted.keys() & points.keys():
        points[name].add_hook(lambda tensor, hook, name=name: fired.update([name]))
    observe(subject, case, backward=False)
    for name in wanted:
        if fired[name] != 1:
            yield Gap(name, "count", f"fired {fired[name]} times instead of once")


@check(
    "compatibility.trains",
    "In compatibility mode a backward from the real tokens still gives every parameter of the "
    "bridge a gradient, and a finite one, also where padding leaves queries no key to see.",
    lambda: processed_cases(paddings=("none", "left", "left", "gap", "rows")),
    examples=0.2,
)
def trains(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Processed weights are other tensors than the model's, but not detached ones."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    process(subject, case)
    bridge = subject.bridge
    assert bridge is not None
    mask = inputs(case).attention_mask
    with at_work("a backward in compatibility mode"):
        logits = bridge(**arguments(subject, case))
        (logits if mask is None else logits[mask.bool()]).sum().backward()
    for name, parameter in bridge.named_parameters():
        if parameter.grad is None:
            yield Gap(name, "missing", "no gradient")
        elif not parameter.grad.isfinite().all():
            yield Gap(name, "gradient", "is not finite")


@check(
    "compatibility.frozen",
    "What is frozen stays so when weights are processed, and what is trained goes on being "
    "trained; what processing adds is frozen where all else is. The mode stays, too.",
    processed_cases,
    examples=0.15,
)
def frozen(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Processed weights are new parameters. Of three cases one freezes all, two every other."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = bridge_of(subject)
    before = dict(bridge.named_parameters())
    chosen = case.run.token_seed % 3
    held = [name for at, name in enumerate(before) if not chosen or at % 2 == chosen % 2]
    for name in held:
        before[name].requires_grad_(False)
    training = bool(case.run.token_seed & 1)
    bridge.train(training)
    process(subject, case)
    if bridge.training != training:
        yield Gap("training", "contract", f"is {bridge.training} afterwards")
    for name, parameter in bridge.named_parameters():
        due = name not in held if name in before else len(held) < len(before)
        if parameter.requires_grad is not due:
            yield Gap(name, "contract", f"is {'frozen' if due else 'trained'} afterwards")
