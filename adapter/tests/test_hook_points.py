"""Hook points are places of their own: copies forwards, gradients in turn backwards."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from adapter.hooks import OlmoHookPoint
from adapter.tests import models
from adapter.tests.models import TOKENS, same

SITE = "blocks.1.hook_resid_pre"
GATED = [
    "blocks.0.attn.hook_result",
    "blocks.1.hook_q_input",
    "blocks.0.attn.hook_k_input",
    "blocks.0.hook_attn_in",
    "blocks.1.hook_mlp_in",
]


def half(tensor: Any, hook: Any) -> Any:
    return tensor * 0.5


def half_in_place(tensor: Any, hook: Any) -> None:
    tensor.copy_(tensor * 0.5 if tensor.is_floating_point() else tensor.roll(1, -1))


@pytest.mark.parametrize("site", ["embed.hook_in", "blocks.0.attn.hook_in", "blocks.1.hook_in"])
def test_an_edit_in_place_changes_no_neighbour_and_no_token_of_the_caller(site: str) -> None:
    bridge, tokens = models.bridged(models.olmo(num_hidden_layers=2)), TOKENS.clone()
    with torch.no_grad():
        _, plain = bridge.run_with_cache(tokens)
        with bridge.hooks(fwd_hooks=[(site, half_in_place)]):
            _, cache = bridge.run_with_cache(tokens)
    assert torch.equal(tokens, TOKENS)
    for name in plain:
        if bridge.hook_dict[name].name == site:
            break
        assert same(cache[name], plain[name]), name


def test_the_logits_are_the_caller_s_own() -> None:
    bridge = models.bridged(models.olmo())
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(TOKENS)
        kept = logits.clone()
        logits.clamp_(-0.1, 0.1)
    assert same(cache["unembed.hook_out"], kept)


@pytest.mark.parametrize("site", ["unembed.hook_out", "blocks.0.hook_out", "blocks.1.hook_in"])
def test_what_a_hook_has_seen_is_not_the_caller_s_to_change(site: str) -> None:
    bridge, seen = models.bridged(models.olmo()), []

    def look(tensor: Any, hook: Any) -> None:
        seen.append(tensor)
        hook.remove_hooks("fwd")

    bridge.add_hook(site, look)
    with torch.no_grad():
        output = bridge(TOKENS, stop_at_layer=None if site.startswith("unembed") else 1)
    kept = seen[0].clone()
    output.zero_()
    assert same(seen[0], kept)


def test_a_hook_may_run_the_model_under_a_flag_of_its_input() -> None:
    bridge = models.bridged(models.olmo())
    bridge.set_use_split_qkv_input(True)
    edit = ("blocks.0.attn.hook_q_input", half)
    within: list[Any] = []

    def run(tensor: Any, hook: Any) -> None:
        if not within:
            within.append(None)
            within[0] = bridge(TOKENS.flip(1))

    with torch.no_grad():
        plain = [bridge.run_with_hooks(t, fwd_hooks=[edit]) for t in (TOKENS, TOKENS.flip(1))]
        outer = bridge.run_with_hooks(TOKENS, fwd_hooks=[edit, ("blocks.0.ln1.hook_out", run)])
    assert same(outer, plain[0])
    assert same(within[0], plain[1])


def gradients_of(bridge: Any, *hooks: Any, forward: Any = (), site: str = SITE) -> Any:
    bridge.zero_grad()
    with bridge.hooks(fwd_hooks=list(forward), bwd_hooks=[(site, hook) for hook in hooks]):
        models.backward(bridge(TOKENS))
    return [parameter.grad.clone() for parameter in bridge.original_model.parameters()]


def test_a_gradient_that_a_hook_returns_is_what_the_next_one_sees() -> None:
    bridge = models.bridged(models.olmo())
    seen = []

    def keep(gradient: Any, hook: Any) -> None:
        seen.append(gradient.clone())

    twice = gradients_of(bridge, keep, half, keep, half)
    assert same(seen[1], seen[0] * 0.5)
    once = gradients_of(bridge, lambda gradient, hook: gradient * 0.25)
    assert all(same(a, b) for a, b in zip(twice, once, strict=True))


def test_a_returned_gradient_flows_on_through_the_forward_edit() -> None:
    bridge = models.bridged(models.olmo())
    both = gradients_of(bridge, lambda gradient, hook: gradient * 2, forward=[(SITE, half)])
    plain = gradients_of(bridge, forward=[(SITE, half)])
    embedding, *_ = [name for name, _ in bridge.original_model.named_parameters()]
    assert "embed" in embedding
    assert same(both[0], plain[0] * 2)


def half_written(gradient: Any, hook: Any) -> Any:
    return gradient.mul_(0.5)


@pytest.mark.parametrize("write", [half_in_place, half_written])
@pytest.mark.parametrize("site", ["hook_attn_out", "hook_mlp_out", "attn.hook_q", "hook_resid_pre"])
def test_a_gradient_written_to_in_place_changes_what_a_returned_one_does(
    site: str, write: Any
) -> None:
    bridge = models.bridged(models.olmo(num_hidden_layers=2))
    due = gradients_of(bridge, half, site=f"blocks.1.{site}")
    got = gradients_of(bridge, write, site=f"blocks.1.{site}")
    assert all(same(a, b) for a, b in zip(got, due, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("site", ["blocks.0.mlp.hook_post", "blocks.1.attn.hook_pattern"])
def test_a_recomputed_block_has_the_hooks_of_its_forward(site: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        bridge = models.bridged(models.olmo(num_key_value_heads=2))
        if checkpointing:
            bridge.original_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        bridge.train()
        if reentrant:  # PyTorch's reentrant checkpoint needs an input that has a gradient
            bridge.original_model.enable_input_require_grads()
        logits = bridge.run_with_hooks(TOKENS, fwd_hooks=[(site, half)])
        point = bridge.hook_dict[site]
        point.add_hook(lambda tensor, hook: tensor * 0)
        late = point.fwd_hooks[-1]  # add_hook returns it, but not before transformer_lens 4.3
        models.backward(logits)
        late.hook.remove()
        assert not bridge.hook_dict[site]._forward_hooks
        gradients.append([p.grad for p in bridge.original_model.parameters()])
    assert all(same(a, b) for a, b in zip(*gradients, strict=True))


def test_a_hook_may_remove_another_while_a_checkpointed_block_runs() -> None:
    bridge = models.bridged(models.olmo())
    bridge.original_model.gradient_checkpointing_enable({"use_reentrant": False})
    bridge.train()
    fired = []
    later = bridge.hook_dict["blocks.0.mlp.hook_out"]
    later.add_hook(lambda tensor, hook: fired.append(hook.name))
    handle = later.fwd_hooks[-1]
    bridge.add_hook("blocks.0.attn.hook_z", lambda tensor, hook: handle.hook.remove())
    bridge(TOKENS)
    assert fired == []


def wrappers(bridge: Any) -> list[Any]:
    return [block.original_component._gradient_checkpointing_func for block in bridge.blocks]


def test_a_checkpoint_is_wrapped_once_whoever_runs_it() -> None:
    bridge = models.bridged(models.olmo())
    bridge.original_model.gradient_checkpointing_enable({"use_reentrant": False})
    bridge.train()
    bare = wrappers(bridge)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(bridge, [TOKENS] * 40))
    finally:
        sys.setswitchinterval(before)
    twins: list[Any] = []
    copy_it = [("blocks.0.attn.hook_z", lambda tensor, hook: twins.append(copy.deepcopy(bridge)))]
    bridge.run_with_hooks(TOKENS, fwd_hooks=copy_it)
    for each in (bridge, twins[0]):
        assert [wrapper.block for wrapper in wrappers(each)] == list(each.blocks)
        assert [wrapper.function.func for wrapper in wrappers(each)] == [bare[0].func] * 2


@pytest.mark.parametrize("name", GATED)
def test_caching_by_name_what_no_forward_fires_is_refused(name: str) -> None:
    bridge = models.bridged(models.olmo())
    canonical = str(bridge.hook_dict[name].name)
    for asked in (name, [canonical, SITE]):
        with pytest.raises(ValueError, match=r"set_use_\w+\(True\)"):
            bridge.run_with_cache(TOKENS, names_filter=asked)
        with pytest.raises(ValueError, match=r"set_use_\w+\(True\)"):
            bridge.run_with_cache(TOKENS, True, False, asked)
        with pytest.raises(ValueError, match=r"set_use_\w+\(True\)"):
            bridge.add_caching_hooks(names_filter=asked)
    assert not any(point._forward_hooks for point in bridge.hook_dict.values())


def test_caching_what_a_flag_has_turned_on_works() -> None:
    bridge = models.bridged(models.olmo())
    bridge.set_use_hook_mlp_in(True)
    _, cache = bridge.run_with_cache(TOKENS, names_filter="blocks.1.hook_mlp_in")
    assert list(cache) == ["blocks.1.hook_mlp_in"]


def test_a_filter_that_sweeps_over_gated_hooks_skips_them() -> None:
    bridge = models.bridged(models.olmo())
    with pytest.warns(UserWarning, match="skipped"):
        _, cache = bridge.run_with_cache(TOKENS, names_filter=lambda name: "blocks.0" in name)
    assert "blocks.0.hook_mlp_in" not in cache
    assert "blocks.0.hook_resid_mid" in cache


def test_every_hook_point_is_one_of_ours_also_before_there_is_a_bridge() -> None:
    bridge = models.bridged(models.olmo())
    assert {type(point) for point in bridge.hook_dict.values()} == {OlmoHookPoint}
    attention = bridge.adapter.component_mapping["blocks"].submodules["attn"]
    assert type(attention.submodules["q"].hook_in) is OlmoHookPoint


@pytest.mark.parametrize("site", ["hook_z", "hook_q", "hook_q_clipped", "hook_rot_k", "hook_out"])
def test_what_a_hook_sees_is_on_the_way_of_the_gradient(site: str) -> None:
    bridge = models.bridged(models.olmo(clip_qkv=0.5))
    kept: dict[str, Any] = {}

    def keep(tensor: torch.Tensor, hook: Any) -> None:
        tensor.retain_grad()
        kept["seen"] = tensor

    def backwards(gradient: torch.Tensor, hook: Any) -> None:
        kept["due"] = gradient

    name = f"blocks.0.attn.{site}"
    bridge.run_with_hooks(
        TOKENS, return_type="loss", fwd_hooks=[(name, keep)], bwd_hooks=[(name, backwards)]
    ).backward()
    assert torch.equal(kept["seen"].grad, kept["due"])
