"""Slopes against difference quotients, where the bridge computes in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.func import functional_call

from conformance.checks.registry import Adapter, check
from conformance.compare import Gap
from conformance.spec import Case
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import Subject, at_work, bridged


def smooth_cases() -> SearchStrategy[Case]:
    """Small float64 cases, most of which clip."""
    sizes = st.sampled_from((2, 4))
    clips = st.sampled_from((1.0, 0.5, 1.5, 0.2, 0.0, None))
    models = model_specs(dtypes=st.just("float64"), head_dims=sizes, clips=clips)
    return cases(models=models, runs=partial(run_specs, lengths=st.sampled_from((2, 3))))


# How far every entry of q, k and v is from the clip at least: a difference quotient moves it by
# some 1e-6. And how far a slope may be from the quotient: projection and rotation are linear in
# each argument, so that nothing but rounding is left, 1e-10 of float64 numbers of size one.
_CLEAR = 1e-4
_QUOTIENT = 1e-8


def _before_the_softmax(subject: Subject, case: Case, block: int) -> Callable[..., Any]:
    """A block's projected, clipped and rotated q, k and v, of hidden states and weights.

    The first three tensors of the tuple are the projections, ``[batch, pos, head, d_head]``.
    """
    assert subject.bridge is not None
    attention = subject.bridge.blocks[block].attn
    names = [name for name, _ in attention.named_parameters()]
    draw = torch.Generator().manual_seed(case.run.token_seed)
    angles = 6 * torch.rand((1, case.run.seq_len, case.model.d_head // 2), generator=draw).double()
    turns = torch.cat((angles, angles), dim=-1)
    hooks = ["q.hook_out", "k.hook_out", "v.hook_out", "hook_rot_q", "hook_rot_k"]
    if "blocks.{i}.attn.hook_v_clipped" in subject.optional_hooks:
        hooks.append("hook_v_clipped")
    seen: dict[str, torch.Tensor] = {}
    for hook in hooks:
        point = subject.bridge.hook_dict[f"blocks.{block}.attn.{hook}"]
        point.add_hook(lambda tensor, hook, name=hook: seen.update({name: tensor}))

    def function(hidden: torch.Tensor, *weights: torch.Tensor) -> Any:
        given = {"position_embeddings": (turns.cos(), turns.sin()), "attention_mask": None}
        called = dict(zip(names, weights, strict=True))
        functional_call(attention, called, (), {"hidden_states": hidden, **given})
        return tuple(seen[hook] for hook in hooks)

    return function


def _clear_of_the_kink(function: Callable[..., Any], case: Case, weights: Any) -> torch.Tensor:
    """Drawn hidden states ``[batch, pos, d_model]`` that put no entry on the clip."""
    draw = torch.Generator().manual_seed(case.run.token_seed)
    shape = (case.run.batch, case.run.seq_len, case.model.hidden_size)
    while True:
        hidden = torch.randn(shape, generator=draw).double()
        if case.model.clip_qkv is None:
            return hidden
        with torch.no_grad():
            away = [
                (x.abs() - case.model.clip_qkv).abs().min() for x in function(hidden, *weights)[:3]
            ]
        if min(away) > _CLEAR:
            return hidden


@check(
    "derivatives.quotients",
    "In float64 and away from the clamp's kink the bridge's projections, clamp and rotation have "
    "the slopes that difference quotients have, backwards, forwards and of second order.",
    smooth_cases,
    examples=0.15,
)
def quotients(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Not beyond them: Hugging Face computes LayerNorm and softmax in float32."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    block = case.run.token_seed % case.model.num_hidden_layers
    attention = subject.bridge.blocks[block].attn
    weights = [weight.detach().clone().requires_grad_() for weight in attention.parameters()]
    with at_work("calling an attention alone"):
        function = _before_the_softmax(subject, case, block)
        hidden = _clear_of_the_kink(function, case, weights).requires_grad_()
        by = partial(gradcheck, atol=_QUOTIENT, rtol=_QUOTIENT, fast_mode=True)
        slopes = partial(by, function, (hidden, *weights), check_forward_ad=True)
        by = partial(gradgradcheck, atol=_QUOTIENT, rtol=_QUOTIENT, fast_mode=True)
        bends = partial(by, function, (hidden, *weights))
        for name, compare in (("slopes", slopes), ("second derivatives", bends)):
            try:
                compare()
            except GradcheckError as error:
                told = " ".join(str(error).split())
                yield Gap(f"blocks.{block}.attn: {name}", "gradient", told[:200])
