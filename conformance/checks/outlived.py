"""What a run leaves behind in memory: nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward, sites_to_hook
from conformance.compare import Gap
from conformance.inputs import Inputs, inputs
from conformance.observe import observe, options, started
from conformance.points import OnPurposeError
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged


def _alive() -> list[torch.Tensor]:
    """Every tensor that the garbage collector tracks; frozen ones (`gc.freeze`) are left out."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]


def _adding(tensor: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A hook that holds a tensor."""
    return lambda seen, hook: seen + tensor


def _breaking() -> Callable[..., None]:
    """A hook that fails, with a tensor in its hands."""

    def hook(tensor: torch.Tensor, hook: HookPoint) -> None:
        held = tensor * 2
        raise OnPurposeError(held.ndim)

    return hook


def use(subject: Subject, case: Case, data: Inputs) -> None:
    """Run a bridge in many ways, with hooks that look on, and drop what comes of it."""
    bridge: Any = bridge_of(subject)
    observe(subject, case, sites=sites_to_hook(subject, case), data=data)
    given = {"return_type": "logits", **options(subject, case)}
    with at_work("forwards of every kind"), started(subject, case):
        bridge(data.tokens, **given).sum().backward()
        bridge.run_with_cache(data.tokens, **given)
        picked = {"names_filter": "blocks.0.hook_in", "return_type": "loss"}
        bridge.run_with_cache(data.tokens, **{**given, **picked}, incl_bwd=True)
        bridge.run_with_hooks(
            data.tokens, fwd_hooks=[("hook_embed", _adding(torch.zeros(())))], **given
        )
        bridge(data.tokens, **{**given, "stop_at_layer": 1})
        for name in ("blocks.0.hook_in", "ln_final.hook_out"):
            with suppress(OnPurposeError):
                bridge.run_with_hooks(data.tokens, fwd_hooks=[(name, _breaking())], **given)
        flag = ("use_attn_in", "use_split_qkv_input")[drawing(case)(2)]
        getattr(bridge, f"set_{flag}")(True)
        bridge.set_use_attn_result(True)
        bridge(data.tokens, **given)
        bridge.set_use_attn_result(False)
        getattr(bridge, f"set_{flag}")(False)
        bridge.generate(data.tokens[:1, :1], max_new_tokens=1, stop_at_eos=False, verbose=False)


@check(
    "surface.nothing_kept",
    "Nothing is left alive of the tensors of forwards, backwards, cached, hooked, stopped, failing "
    "and generating runs, and of those under flags, once their results are dropped.",
    cases,
    examples=0.07,
)
def nothing_kept(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A census of all tensors before and after."""
    case = in_one_forward(case, training=False, padding="none")
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    data = inputs(case)
    before = _alive()
    known = {id(each) for each in before}
    use(subject, case, data)
    bridge_of(subject).zero_grad(set_to_none=True)
    for parameter in subject.parameters.values():
        parameter.grad = None
    for left in _alive():
        if id(left) not in known:
            told = f"a tensor of shape {list(left.shape)} is alive when its run is over"
            yield Gap("memory", "extra", told)
