"""The hooks around the clamp, its gradient at the kink, and clips of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.checks.support import everywhere_gaps, has_exact, in_one_forward
from conformance.compare import (
    Gap,
    compare_gradients,
    compare_parameters,
    compare_tensors,
    labelled,
)
from conformance.observe import observe, sites_of
from conformance.sites import POST_CLIP
from conformance.spec import Case, ModelSpec
from conformance.strategies import WIDE_DTYPES, cases, clip_present, model_specs
from conformance.subjects import Subject, bridged, patched, reference, takes_whole_clips
from conformance.tolerance import exactly
from conformance.verdict import NotApplicable


def clipped_wide_cases() -> SearchStrategy[Case]:
    """Cases with a clip, in dtypes in which a matmul by hand is Hugging Face's."""
    return cases(models=model_specs(clips=clip_present(), dtypes=WIDE_DTYPES))


@check(
    "clamp.post_clip",
    "The post-clip hooks carry what attention uses: within the clip, equal to the clamped hook_q, "
    "hook_k and hook_v, and hook_pattern @ hook_v_clipped is hook_z.",
    clipped_wide_cases,
    examples=0.3,
)
def post_clip(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """An identity between hooks of one bridge: no reference is needed."""
    if not set(POST_CLIP) <= set(getattr(adapter, "optional_hooks", ())):
        raise NotApplicable("the adapter declares no post-clip hooks")
    case = replace(case, run=replace(case.run, chunks=1, training=False))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    seen = observe(subject, case, sites=sites_of(subject, case), backward=False).values
    clip = case.model.clip_qkv
    assert clip is not None
    groups = case.model.num_attention_heads // case.model.num_key_value_heads
    for block in range(case.model.num_hidden_layers):
        attn = f"blocks.{block}.attn"
        for letter in "qkv":
            name = f"{attn}.hook_{letter}_clipped"
            due = seen[f"{attn}.{letter}.hook_out"].clamp(-clip, clip)
            gap = compare_tensors(name, due, seen[name], exactly(due.dtype))
            yield from [gap] if gap else []
        value = seen[f"{attn}.hook_v_clipped"].transpose(1, 2).repeat_interleave(groups, dim=1)
        z = (seen[f"{attn}.hook_pattern"] @ value).transpose(1, 2)
        name = f"{attn}.o.hook_in"
        gap = compare_tensors(f"{name} (pattern @ v_clipped)", z, seen[name], exactly(z.dtype))
        yield from [gap] if gap else []


def _put_on_the_kink(subject: Subject, clip: float) -> None:
    """Make every entry of q, k and v exactly +clip, -clip or 0: no weight, only a bias."""
    with torch.no_grad():
        for name, parameter in subject.parameters.items():
            letter = name.split(".")[-2][0] if "_proj." in name else ""
            if "self_attn" not in name or letter not in ("q", "k", "v"):
                continue
            if name.endswith("weight"):
                parameter.zero_()
            else:
                pattern = torch.arange(parameter.numel()) % 3 - 1
                parameter.copy_(pattern * clip)


@check(
    "clamp.kink",
    "At entries of exactly +clip and -clip the clamp's gradient is Hugging Face's.",
    lambda: cases(models=model_specs(clips=clip_present(), biases=st.just(("q", "k", "v", "o")))),
    examples=0.3,
)
def kink(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Weights of zero and biases of plus and minus the clip put every entry on the kink."""
    case = replace(case, run=replace(case.run, chunks=1))
    clip = case.model.clip_qkv
    assert clip is not None
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    truth = reference(case.model)
    for each in (truth, subject):
        _put_on_the_kink(each, clip)
    wanted = {name: site for name, site in sites_of(subject, case).items() if not site.derived}
    expected = observe(truth, case, sites=wanted)
    actual = observe(subject, case, sites=wanted)
    yield from compare_gradients(expected, actual, wanted)
    yield from compare_parameters(expected, actual)


# Those of published models and of experiments: whole numbers too, tiny and huge. A configuration
# that was written by hand has an 8 where others have 8.0.
_SIZES = (8.0, 8, 1.0, 2, 7.7, 0.125, 6.3, 100, 1e-4, 3e4)
_LARGEST = {"float16": 12.0}  # of which scores and gradients stay finite


def sized_cases() -> SearchStrategy[Case]:
    """Cases with a clip of any size, which binds once the projections are of that size."""

    def sized(model: ModelSpec, size: float) -> ModelSpec:
        clip = min(size, _LARGEST.get(model.dtype, size))
        return replace(model, clip_qkv=clip if takes_whole_clips() else float(clip))

    drawn = model_specs(clips=st.just(1.0))
    return cases(models=st.builds(sized, drawn, st.sampled_from(_SIZES)))


def _enlarge(subject: Subject, model: ModelSpec) -> None:
    """Make the entries of q, k and v of the size of the clip."""
    assert model.clip_qkv is not None
    factor = model.clip_qkv / (model.weight_scale * sqrt(model.hidden_size))
    with torch.no_grad():
        for name, parameter in subject.parameters.items():
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                parameter.mul_(factor)


@check(
    "clamp.sizes",
    "A clip of any size, from a ten-thousandth to tens of thousands, among projections of that "
    "size clamps as Hugging Face does: every value and gradient of a bridge and of an exactly "
    "patched model is the reference's.",
    sized_cases,
    examples=0.25,
)
def sizes(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The weights and biases of q, k and v are scaled to the clip."""
    case = in_one_forward(case)
    subjects = {"bridged": bridged(case.model, adapter, prepared=case.run.prepared)}
    if has_exact(adapter):
        subjects["patched"] = patched(case.model, adapter, exact_clip=True)
    truth = reference(case.model)
    for each in (truth, *subjects.values()):
        _enlarge(each, case.model)
    for kind, subject in subjects.items():
        yield from labelled(kind, everywhere_gaps(truth, subject, case))
