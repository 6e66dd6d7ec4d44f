"""Every hook that is advertised fires, and every edit acts where it was made and nowhere else."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adapter.tests import models
from adapter.tests.models import SHAPES, TOKENS, same

FLAGGED = {
    "use_split_qkv_input": {"hook_q_input", "hook_k_input", "hook_v_input"},
    "use_attn_in": {"hook_attn_in"},
    "use_attn_result": {"hook_result"},
    "use_hook_mlp_in": {"hook_mlp_in"},
}
ALWAYS_NULL = ["rotary_emb.hook_in"]  # only its dtype and device are read, as in Hugging Face


def flagged(bridge: Any, flag: Any) -> Any:
    if flag is not None:
        setattr(bridge.cfg, flag, True)
    return bridge


def half_one(tensor: Any, hook: Any) -> Any:
    return torch.cat((tensor[:, :1] / 2, tensor[:, 1:]), dim=1)


def flip(tensor: Any) -> Any:
    """Change the second position, and nothing else."""
    tensor = tensor.clone()
    tensor[:, 1] = 0.1 - tensor[:, 1]
    return tensor


def live_names(bridge: Any, flag: Any) -> Any:
    gated = set().union(*FLAGGED.values()) - FLAGGED.get(flag, set())
    return [name for name in bridge.hook_dict if name.rsplit(".", 1)[-1] not in gated]


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("flag", [None, *FLAGGED])
def test_every_name_fires_once(flag: Any, processed: Any) -> None:
    bridge = models.bridged(models.olmo(**SHAPES["gqa-clip-bias"]))
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
    flagged(bridge, flag)
    fired: Counter[str] = Counter()
    for name, point in bridge.hook_dict.items():
        point.add_hook(lambda tensor, hook, name=name: fired.update([name]))
    bridge(TOKENS)
    assert fired == dict.fromkeys(live_names(bridge, flag), 1)


def test_no_dead_names() -> None:
    names = models.bridged(models.olmo()).hook_dict
    dead = ("hook_pos_embed", "rotary_emb.hook_out", "attn.hook_hidden_states")
    assert not [name for name in names if name.endswith(dead)]


@pytest.mark.parametrize("flag", [None, *FLAGGED])
@pytest.mark.parametrize("shape", ["gqa-clip-bias", "mqa-head_dim"])
def test_an_edit_acts_and_in_place_it_acts_the_same(shape: Any, flag: Any) -> None:
    bridge = flagged(models.bridged(models.olmo(**SHAPES[shape])), flag)
    plain = bridge(TOKENS)

    def returned(tensor: Any, hook: Any) -> Any:
        return flip(tensor)

    def in_place(tensor: Any, hook: Any) -> Any:
        tensor.copy_(flip(tensor))

    for name in live_names(bridge, flag):
        if name == "embed.hook_in" or name.startswith("blocks.1."):  # token ids; as in block 0
            continue
        results = []
        for edit in (returned, in_place):
            bridge.zero_grad()
            logits = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)])
            models.backward(logits)
            grads = [p.grad for p in bridge.parameters() if p.grad is not None]
            results.append([logits, *grads])
        assert all(map(same, *results)), name
        assert same(results[0][0], plain) == (name in ALWAYS_NULL), name


def test_hooks_around_the_clamp() -> None:
    reference, bridge = models.pair(**SHAPES["gqa-clip-bias"])
    _, cache = bridge.run_with_cache(TOKENS)
    attention = reference.model.layers[0].self_attn
    normed = cache["blocks.0.ln1.hook_out"]
    for name in "qkv":
        projected = getattr(attention, f"{name}_proj")(normed)
        assert same(cache[f"blocks.0.attn.hook_{name}"].flatten(2), projected)
        clipped = cache[f"blocks.0.attn.hook_{name}_clipped"]
        assert same(clipped.flatten(2), projected.clamp(-0.5, 0.5))
        assert not same(clipped.flatten(2), projected)
    values = cache["blocks.0.attn.hook_v_clipped"].repeat_interleave(2, dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", cache["blocks.0.attn.hook_pattern"], values)
    torch.testing.assert_close(z, cache["blocks.0.attn.hook_z"])


def test_the_clamp_s_gradient_at_the_clip_itself() -> None:
    bridge = models.bridged(models.olmo(clip_qkv=0.5))
    seen: dict[str, torch.Tensor] = {}

    hooks = [("blocks.0.attn.hook_v", lambda tensor, hook: tensor * 0 + 0.5)]
    watch = [("blocks.0.attn.hook_v", lambda grad, hook: seen.update(before=grad.clone()))]
    watch += [("blocks.0.attn.hook_v_clipped", lambda g, hook: seen.update(after=g.clone()))]
    with bridge.hooks(fwd_hooks=hooks, bwd_hooks=watch):
        models.backward(bridge(TOKENS))
    # Like Hugging Face's clamp_: an entry exactly at the clip passes its whole gradient until
    # PyTorch 2.13, and nothing of it from 2.14 on.
    kink = torch.full_like(seen["after"], 0.5, requires_grad=True)
    (due,) = torch.autograd.grad(kink.clamp(-0.5, 0.5), kink, seen["after"])
    assert seen["after"].any()
    assert same(seen["before"], due)


def test_per_head_copies_reach_their_own_head_only() -> None:
    bridge = flagged(models.bridged(models.olmo(num_key_value_heads=2)), "use_split_qkv_input")

    def edit(tensor: Any, hook: Any) -> Any:
        tensor[:, :, 1] *= torch.linspace(-1, 1, 32)

    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_k_input", edit)]):
        _, edited = bridge.run_with_cache(TOKENS)
    _, plain = bridge.run_with_cache(TOKENS)
    before, after = (cache["blocks.0.attn.hook_k"] for cache in (plain, edited))
    assert same(after[:, :, 0], before[:, :, 0])
    residual = plain["blocks.0.hook_resid_pre"] * torch.linspace(-1, 1, 32)
    normed = bridge.blocks[0].ln1.original_component(residual)
    expected = torch.einsum("bpm,md->bpd", normed, bridge.blocks[0].attn.W_K[1])
    torch.testing.assert_close(after[:, :, 1], expected)
    assert same(edited["blocks.0.attn.hook_q"], plain["blocks.0.attn.hook_q"])


@pytest.mark.parametrize("site", ["ln1.hook_in", "ln1.hook_out", "attn.hook_in"])
def test_heads_read_the_stream_also_where_a_hook_turns_the_flag_on(site: str) -> None:
    bridge = models.bridged(models.olmo())
    seen: dict[str, torch.Tensor] = {}

    def keep(tensor: Any, hook: Any) -> None:
        seen[hook.name] = tensor

    names = "blocks.0.hook_in", "blocks.0.attn.hook_q_input"
    for name in names:
        bridge.hook_dict[name].add_hook(keep)
    turn = (f"blocks.0.{site}", lambda tensor, hook: bridge.set_use_split_qkv_input(True))
    bridge.run_with_hooks(TOKENS, fwd_hooks=[turn])
    stream, heads = (seen[name] for name in names)
    assert same(heads, stream.unsqueeze(2).expand_as(heads))


def test_attn_in_reaches_the_key_value_head_of_its_group() -> None:
    bridge = flagged(models.bridged(models.olmo(num_key_value_heads=2)), "use_attn_in")

    def edit(tensor: Any, hook: Any) -> Any:
        tensor[:, :, 3] *= torch.linspace(-1, 1, 32)

    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_in", edit)]):
        _, edited = bridge.run_with_cache(TOKENS)
    _, plain = bridge.run_with_cache(TOKENS)
    for name, touched in (("q", [3]), ("k", [1]), ("v", [1])):
        before, after = (c[f"blocks.0.attn.hook_{name}"] for c in (plain, edited))
        for head in range(before.shape[2]):
            assert same(before[:, :, head], after[:, :, head]) == (head not in touched)


def test_edits_that_do_not_compose_are_refused() -> None:
    bridge = flagged(models.bridged(models.olmo()), "use_split_qkv_input")
    both = ["blocks.0.ln1.hook_out", "blocks.0.attn.hook_q_input"]
    with pytest.raises(ValueError, match="edit one of them"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(n, lambda t, hook: flip(t)) for n in both])


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
def test_a_stream_that_is_not_finite_is_no_edit(flag: Any) -> None:
    bridge = models.bridged(models.olmo())

    def spoil(tensor: Any, hook: Any) -> Any:
        return torch.where(torch.arange(tensor.shape[1]) == 3, torch.inf, tensor.mT).mT

    def queries() -> Any:
        seen: list[torch.Tensor] = []
        halved = ("blocks.0.attn.hook_in", lambda tensor, hook: tensor * 0.5)
        kept = ("blocks.0.attn.hook_q", lambda tensor, hook: seen.append(tensor.clone()))
        hooks = [("blocks.0.hook_resid_pre", spoil), halved, kept]
        bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)
        return seen[0]

    expected = queries()
    assert expected[:, 3].isnan().all()
    assert not expected[:, 2].isnan().any()
    setattr(bridge.cfg, flag, True)
    assert same(queries(), expected)


@pytest.mark.parametrize("flag", FLAGGED)
def test_a_flag_costs_a_fake_forward_nothing(flag: str) -> None:
    bridge = flagged(models.bridged(models.olmo()), flag)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert bridge(TOKENS).shape == (*TOKENS.shape, bridge.cfg.d_vocab)


def test_per_head_hooks_need_a_plain_weight() -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Any) -> Any:
            return self.linear(x)

    model = models.olmo()
    model.model.layers[0].self_attn.q_proj = Adapted(model.model.layers[0].self_attn.q_proj)
    bridge = flagged(models.bridged(model), "use_split_qkv_input")
    assert same(bridge(TOKENS), models.olmo()(TOKENS).logits)
    bridge.add_hook("blocks.0.attn.hook_q_input", lambda tensor, hook: None)
    with pytest.raises(TypeError, match="Adapted"):
        bridge(TOKENS)


def test_a_linear_map_that_computes_more_has_no_plain_weight() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: Any) -> Any:
            return 2 * super().forward(input)

    def olmo() -> Any:
        model = models.olmo()
        model.model.layers[0].self_attn.o_proj.__class__ = Doubled
        return model

    bridge = flagged(models.bridged(olmo()), "use_attn_result")
    assert same(bridge(TOKENS), olmo()(TOKENS).logits)
    bridge.add_hook("blocks.0.attn.hook_result", lambda tensor, hook: None)
    with pytest.raises(TypeError, match="Doubled"):
        bridge(TOKENS)


@pytest.mark.parametrize("flag", FLAGGED)
def test_an_offloaded_model_is_edited_as_any(flag: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    wrapped = "" if flag == "use_hook_mlp_in" else "attn."
    edits = [(f"blocks.1.{wrapped}{name}", half_one) for name in FLAGGED[flag]]
    logits = []
    for offloaded in (False, True):
        model = models.olmo(**SHAPES["gqa-clip-bias"])
        if offloaded:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        bridge = flagged(models.bridged(model), flag)
        logits += [bridge(TOKENS), bridge.run_with_hooks(TOKENS, fwd_hooks=edits)]
    plain, edited, *again = logits
    assert not same(plain, edited)
    assert all(map(same, (plain, edited), again))


def test_results_of_heads_can_be_ablated_exactly() -> None:
    bridge = flagged(models.bridged(models.olmo(**SHAPES["gqa-clip-bias"])), "use_attn_result")
    zero = [("blocks.0.attn.hook_result", lambda tensor, hook: torch.zeros_like(tensor))]
    with bridge.hooks(fwd_hooks=zero):
        _, cache = bridge.run_with_cache(TOKENS)
    bias = bridge.blocks[0].attn.b_O.expand(2, 6, -1)
    assert same(cache["blocks.0.attn.o.hook_out"], bias)


def test_results_of_heads_may_overflow_where_their_sum_does_not() -> None:
    model = models.olmo(torch.float16, num_attention_heads=2)
    attention = model.model.layers[0].self_attn
    for linear in (attention.v_proj, attention.o_proj):
        first, second = linear.weight.data.chunk(2, dim=int(linear is attention.o_proj))
        second.copy_(first if linear is attention.v_proj else -first)
    attention.q_proj.weight.data.zero_()  # every head attends alike
    attention.o_proj.weight.data.mul_(5e4).clamp_(-6e4, 6e4)
    reference = copy.deepcopy(model)(TOKENS).logits
    assert reference.isfinite().all()
    bridge = flagged(models.bridged(model), "use_attn_result")
    seen: list[torch.Tensor] = []
    bridge.add_hook("blocks.0.attn.hook_result", lambda tensor, hook: seen.append(tensor.clone()))
    assert same(bridge(TOKENS), reference)
    assert seen[0].isinf().any()


def test_under_autocast_results_of_heads_leave_the_output_its_dtype() -> None:
    bridge = models.bridged(models.olmo(attention_bias=True))
    bridge.set_use_attn_result(True)
    site = "blocks.0.attn.hook_result"
    seen: dict[str, Any] = {}

    def keep(tensor: Any, hook: Any) -> None:
        seen[hook.name] = tensor

    names = ("blocks.0.attn.o.hook_out", "blocks.0.attn.hook_out")
    hooks = [(site, lambda tensor, hook: tensor * 2), *((name, keep) for name in names)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}


def test_a_compiled_bridge_is_never_traced() -> None:
    # Traced with this shape on PyTorch 2.6, Hugging Face's own model crashes.
    bridge = models.bridged(models.olmo(**SHAPES["gqa-clip-bias"]))
    compiled: Any = torch.compile(bridge, backend="eager")
    plain = bridge(TOKENS)
    traced: list[bool] = []
    point = bridge.hook_dict["blocks.1.attn.hook_pattern"]
    assert same(compiled(TOKENS), plain)
    for factor in (0.5, 2.0):  # hooks that come after it was compiled, one after the other
        point.add_hook(lambda tensor, hook, by=factor: tensor * by)
        point.add_hook(lambda tensor, hook: traced.append(torch.compiler.is_compiling()))
        assert same(compiled(TOKENS), bridge(TOKENS))
        assert not same(compiled(TOKENS), plain)
        point.remove_hooks()
    assert traced
    assert not any(traced)
    assert same(compiled(TOKENS), plain)
