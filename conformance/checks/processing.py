"""What weight processing makes of the weights, and that forward and accessors follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.compatibility import process, processed_runs
from conformance.checks.forward import logits_gap
from conformance.checks.parameters import WRAPPED
from conformance.checks.partial_runs import output_gaps
from conformance.checks.registry import Adapter, check
from conformance.checks.states import lens_names
from conformance.checks.support import drawing, exact_gaps, in_one_forward, quiet
from conformance.checks.weights import read, squared
from conformance.compare import Gap, compare_parameters, compare_tensors, labelled
from conformance.observe import observe
from conformance.parts import stacked, weights
from conformance.spec import PROCESSING, Case
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly, of_processed

Found = dict[str, torch.Tensor]

# What reads a LayerNorm's output, with the axis of d_model in the accessor's layout.
READERS = {"W_Q": -2, "W_K": -2, "W_V": -2, "W_in": -2, "W_gate": -2, "W_U": -2}


def shaped_processed_cases() -> SearchStrategy[Case]:
    """Cases in every dtype and geometry, square ones too, with any set of processing."""
    # A query that sees no key has no pattern in compatibility mode, and a uniform one outside.
    runs = partial(processed_runs, paddings=("none", "none", "right"))
    return cases(models=model_specs().map(squared), runs=runs)


def deep_processed_cases() -> SearchStrategy[Case]:
    """As `shaped_processed_cases`, some with twelve blocks, where all writers are centered."""

    def centering(case: Case) -> Case:
        if case.model.num_hidden_layers < 12:
            return case
        asked = dict.fromkeys((*case.run.processing, "center_writing_weights"))
        return replace(case, run=replace(case.run, processing=tuple(asked)))

    layers = st.sampled_from((1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 12, 12))
    runs = partial(processed_runs, paddings=("none", "none", "right"))
    return cases(models=model_specs(layers=layers).map(squared), runs=runs).map(centering)


def _whole(found: dict[str, torch.Tensor | None], case: Case) -> Found:
    """The weights of `conformance.parts.weights`, those of blocks stacked, by the short name."""
    rest = {name.rpartition(".")[2]: found[name] for name in found if "blocks." not in name}
    present = {name: tensor for name, tensor in rest.items() if tensor is not None}
    return {**present, **stacked(found, case.model)}


def _centered(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor - tensor.mean(axis, keepdim=True)


def _folds(case: Case) -> bool:
    """Whether value biases are folded: asked for, there, and nothing between them and their use."""
    model = case.model
    asked = "fold_value_biases" in case.run.processing
    return asked and "v" in model.biases and model.clip_qkv is None


def _processed(whole: Found, case: Case) -> tuple[Found, Found]:
    """What becomes of what is written to the residual stream and of the unembedding, in float64.

    Returns:
        The weights, and of each that changes the sizes that its rounding depends on.
    """
    asked, model = case.run.processing, case.model
    found, sizes = dict(whole), {}
    if "center_writing_weights" in asked:
        for name in {"W_E", "W_O", "W_out", "b_O"} & whole.keys():
            found[name], sizes[name] = _centered(whole[name], -1), whole[name]
    if "center_unembed" in asked:
        found["W_U"], sizes["W_U"] = _centered(whole["W_U"], -1), whole["W_U"]
    if _folds(case):
        group = model.num_attention_heads // model.num_key_value_heads
        bias, output = whole["b_V"].repeat_interleave(group, dim=1), found["W_O"]
        old = found.get("b_O", torch.zeros_like(output[:, 0, 0]))
        folded = old + torch.einsum("lhd,lhdm->lm", bias, output)
        sums = old.abs() + torch.einsum("lhd,lhdm->lm", bias.abs(), whole["W_O"].abs())
        centers = "center_writing_weights" in asked
        found["b_O"], sizes["b_O"] = _centered(folded, -1) if centers else folded, sums
        found["b_V"] = torch.zeros_like(whole["b_V"])
    return found, sizes


@check(
    "processing.weights",
    "Each processing makes of the weights what it says, in every dtype and square shapes too: "
    "writers lose their mean along d_model, the unembedding along d_vocab, value biases go into "
    "b_O; folding a LayerNorm that has no weight takes at most the readers' mean along d_model; "
    "all else stays, bit for bit, and a second time changes nothing. The mode may have been on "
    "before, without processing; a cast of the bridge casts what there is.",
    deep_processed_cases,
    examples=0.5,
)
def processed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Against the formulas in float64; a reader is centered in all layers or in none."""
    model = case.model
    subject = bridged(model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    before = {name: each.detach().clone() for name, each in subject.parameters.items()}
    draw = drawing(case)
    if draw(3) == 0:
        with at_work("the mode without processing"):
            bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    process(subject, case)
    with at_work("reading the processed weights"):
        raw = {name: None if t is None else t.detach() for name, t in read(bridge, model).items()}
    got, untouched = _whole(raw, case), _whole(weights(before, model), case)
    whole = _whole(weights({name: t.double() for name, t in before.items()}, model), case)
    due, sizes = _processed(whole, case)
    dtype = getattr(torch, model.dtype)
    for name in dict.fromkeys((*due, *got)):
        if name not in due or name not in got:
            kind = "extra" if name in got else "missing"
            yield Gap(name, kind, f"after processing {case.run.processing}")
            continue
        variants = [(due[name], sizes.get(name))]
        if "fold_ln" in case.run.processing and name in READERS:
            variants.append((_centered(due[name], READERS[name]), whole[name]))
        gaps = []
        for wanted, size in variants:
            exact = size is None
            wanted = untouched[name] if exact and name != "b_V" else wanted.to(dtype)
            allowance = exactly(dtype) if size is None else of_processed(size, dtype)
            gaps.append(compare_tensors(name, wanted, got[name], allowance))
        if None not in gaps:
            best = min(gaps, key=lambda gap: gap.greatest or torch.inf)  # type: ignore[union-attr]
            assert best is not None
            yield best
    kept = {name: tensor.clone() for name, tensor in got.items()}
    with quiet():  # a second processing is refused, and says so
        process(subject, replace(case, run=replace(case.run, processing=PROCESSING)))
    with at_work("reading the weights after a second processing"):
        raw = {name: None if t is None else t.detach() for name, t in read(bridge, model).items()}
    again = _whole(raw, case)
    for gap in exact_gaps(kept, again):
        yield replace(gap, site=f"{gap.site} after a second processing")
    if draw(3) == 0:
        other = torch.float32 if dtype is torch.float64 else torch.float64
        with at_work("a cast of processed weights"), quiet():
            bridge.to(other)
            moved = {
                name: None if t is None else t.detach() for name, t in read(bridge, model).items()
            }
        for gap in exact_gaps({n: t.to(other) for n, t in again.items()}, _whole(moved, case)):
            yield replace(gap, site=f"{gap.site} after a cast of processed weights")


def _taken_over(subject: Subject, case: Case) -> tuple[Subject, Subject]:
    """A Hugging Face model with the processed weights, and the subject with its new parameters."""
    bridge = subject.bridge
    assert bridge is not None
    biases = (*case.model.biases, "o") if _folds(case) else case.model.biases
    spec = replace(case.model, tie_word_embeddings=False, biases=tuple(dict.fromkeys(biases)))
    truth = reference(spec)
    with at_work("reading the processed weights"):
        state = bridge.state_dict()  # type: ignore[no-untyped-call]
        named = {name.replace(WRAPPED, ""): each for name, each in bridge.named_parameters()}
    with torch.no_grad():
        for ours, theirs in lens_names(truth.model.state_dict(), spec).items():
            with at_work(f"reading {ours} of the state dict"):
                tensor = state[ours]
            truth.parameters[theirs].copy_(tensor)
    return truth, replace(subject, parameters=named)


def _run_gaps(truth: Subject, subject: Subject, case: Case) -> Iterator[Gap]:
    """The logits, and the gradients of the parameters where there are as many of them."""
    expected, actual = observe(truth, case), observe(subject, case)
    yield from logits_gap(expected, actual)
    if not case.model.tie_word_embeddings:
        yield from compare_parameters(expected, actual)


@check(
    "processing.forward",
    "In compatibility mode accessors, forward and backward, under autocast too, and runs of some "
    "of the blocks are those of a Hugging Face model that has the processed weights, bit for bit.",
    shaped_processed_cases,
    examples=0.4,
)
def forward(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The weights come out of the bridge's own state dict, into a fresh model."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    process(subject, case)
    truth, subject = _taken_over(subject, case)
    assert subject.bridge is not None
    wrong = subject.parameters.keys() ^ truth.parameters.keys()
    # Without any processing a tied unembedding may stay tied.
    if wrong and (wrong != {"lm_head.weight"} or not case.model.tie_word_embeddings):
        yield Gap("parameters", "contract", f"{sorted(wrong)} on one side only")
        return
    due = weights({name: each.detach() for name, each in truth.parameters.items()}, case.model)
    with at_work("reading the processed weights"):
        got = read(subject.bridge, case.model)
    yield from exact_gaps(due, got)
    yield from _run_gaps(truth, subject, case)
    case, draw = in_one_forward(case), drawing(case)
    yield from output_gaps(truth, subject, case)
    if draw(2):
        with torch.autocast("cpu", (torch.bfloat16, torch.float16)[draw(2)]):
            gaps = list(_run_gaps(truth, subject, case))
        yield from labelled("autocast", gaps)
