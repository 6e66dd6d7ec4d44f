"""The hooks inside OLMo's LayerNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import hessian, jvp, vmap
from torch.nn.functional import layer_norm

from adapter.tests import models
from adapter.tests.models import DTYPES, TOKENS, same

EDITS: dict[str, Any] = {
    "factor": lambda t: t * 1.5,
    "sum": lambda t: t + 0.25,
    "constant": lambda t: torch.full_like(t, 2.0),
}
PLACES = ["blocks.0.ln1", "blocks.0.ln2", "blocks.1.ln1", "blocks.1.ln2", "ln_final"]


class FromScratch(torch.nn.Module):
    """OLMo's LayerNorm with an edit inside, computed without a bridge."""

    def __init__(self, inside: Any, edit: Any) -> None:
        super().__init__()
        self.inside, self.edit = inside, edit

    def forward(self, x: Any) -> Any:
        wide = x.to(torch.float32)
        if self.inside == "hook_normalized":
            return self.edit(layer_norm(wide, wide.shape[-1:], eps=1e-5).to(x.dtype))
        centered = wide - wide.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return (centered / self.edit(scale)).to(x.dtype)


def rebuilt(reference: Any, inside: Any, edit: Any) -> Any:
    """Replace every LayerNorm by one with an edit inside."""
    for layer in reference.model.layers:
        layer.input_layernorm = FromScratch(inside, edit)
        layer.post_attention_layernorm = FromScratch(inside, edit)
    reference.model.norm = FromScratch(inside, edit)
    return reference


def with_edits(bridge: Any, inside: Any, hook: Any, watched: Any) -> Any:
    names = [f"{place}.{inside}" for place in PLACES]
    watch = [(name, lambda grad, hook: None) for name in names] if watched else []
    return bridge.hooks(fwd_hooks=[(name, hook) for name in names], bwd_hooks=watch)


@pytest.mark.parametrize("style", ["returned", "watched", "in-place"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("inside", ["hook_scale", "hook_normalized"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_edit_has_the_effect_of_the_same_edit_from_scratch(
    dtype: Any, inside: Any, edit: Any, style: Any
) -> None:
    reference, bridge = models.pair(dtype=dtype)

    def hook(tensor: Any, hook: Any) -> Any:
        if style != "in-place":
            return EDITS[edit](tensor)
        tensor.copy_(EDITS[edit](tensor.clone()))
        return None

    logits = rebuilt(reference, inside, EDITS[edit])(TOKENS).logits
    models.backward(logits)
    with with_edits(bridge, inside, hook, style == "watched"):
        edited = bridge(TOKENS)
        models.backward(edited)
    assert same(edited, logits)
    for a, b in zip(reference.parameters(), bridge.original_model.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            bound = max(2e-5, 8 * torch.finfo(dtype).eps) * a.grad.abs().max().item()
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=bound)


def test_gradients_under_an_edited_scale_do_not_depend_on_other_hooks() -> None:
    found = []
    for others in ((), ("hook_in", "hook_normalized", "hook_out")):
        _, bridge = models.pair()
        scales = [(f"{place}.hook_scale", lambda t, hook: t * 1.5) for place in PLACES]
        looks = [(f"{place}.{name}", lambda t, hook: None) for place in PLACES for name in others]
        with bridge.hooks(fwd_hooks=scales + looks):
            models.backward(bridge(TOKENS))
        found.append([p.grad for p in bridge.original_model.parameters()])
    assert all(same(alone, beside) for alone, beside in zip(*found, strict=True))


def test_a_detached_scale_freezes_the_norm() -> None:
    reference, bridge = models.pair()
    reference.model.norm = FromScratch("hook_scale", torch.Tensor.detach)
    models.backward(reference(TOKENS).logits)
    with bridge.hooks(fwd_hooks=[("ln_final.hook_scale", lambda t, hook: t.detach())]):
        models.backward(bridge(TOKENS))
    frozen = bridge.blocks[1].mlp.out.weight.grad
    expected = reference.model.layers[1].mlp.down_proj.weight.grad
    torch.testing.assert_close(frozen, expected, rtol=1e-4, atol=1e-4)
    other = models.bridged(models.olmo())
    models.backward(other(TOKENS))
    assert not torch.allclose(frozen, other.blocks[1].mlp.out.weight.grad, rtol=0.01)


def test_backward_hooks_see_and_change_the_gradient_of_the_scale() -> None:
    reference, bridge = models.pair()
    kept: dict[str, torch.Tensor] = {}

    def keep(scale: Any) -> Any:
        scale.retain_grad()
        kept["scale"] = scale
        return scale

    reference.model.layers[0].input_layernorm = FromScratch("hook_scale", keep)
    models.backward(reference(TOKENS).logits)

    def drop(grad: Any, hook: Any) -> Any:
        kept["seen"] = grad.clone()
        return torch.zeros_like(grad)

    with bridge.hooks(bwd_hooks=[("blocks.0.ln1.hook_scale", drop)]):
        models.backward(bridge(TOKENS))
    torch.testing.assert_close(kept["seen"], kept["scale"].grad, rtol=1e-4, atol=1e-4)
    dropped, detached = bridge.embed.weight.grad, models.bridged(models.olmo())
    with detached.hooks(fwd_hooks=[("blocks.0.ln1.hook_scale", lambda t, hook: t.detach())]):
        models.backward(detached(TOKENS))
    torch.testing.assert_close(dropped, detached.embed.weight.grad, rtol=1e-4, atol=1e-4)


def test_caching_all_gradients_unfiltered() -> None:
    bridge = models.bridged(models.olmo())
    _, cache = bridge.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
    for place in PLACES:
        assert cache[f"{place}.hook_scale_grad"].any()
        assert same(cache[f"{place}.hook_normalized_grad"], cache[f"{place}.hook_out_grad"])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-and-backward"])
def test_second_derivatives_while_observed(backward: Any) -> None:
    reference, bridge = models.pair(num_hidden_layers=1)
    for norm in (bridge.blocks[0].ln1, bridge.ln_final):
        for point in (norm.hook_scale, norm.hook_normalized):
            point.add_hook(lambda tensor, hook: None)
            if backward:
                point.add_hook(lambda tensor, hook: None, dir="bwd")
    results = []
    for logits, weight in (
        (reference(TOKENS).logits, reference.model.layers[0].self_attn.v_proj.weight),
        (bridge(TOKENS), bridge.blocks[0].attn.v.weight),
    ):
        loss = logits.log_softmax(-1)[..., 3].sum()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        results.append(torch.autograd.grad(first.pow(2).sum(), weight)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_function_transforms_while_observed() -> None:
    bridge = models.bridged(models.olmo())
    norm = bridge.blocks[0].ln1
    norm.hook_scale.add_hook(lambda tensor, hook: None)
    x = torch.randn(1, 2, 32)
    plain = models.olmo().model.layers[0].input_layernorm
    for module in (plain, norm):
        module.total = lambda y, module=module: module(y).pow(3).sum()
    torch.testing.assert_close(hessian(norm.total)(x), hessian(plain.total)(x))
    torch.testing.assert_close(jvp(norm.total, (x,), (x,))[1], jvp(plain.total, (x,), (x,))[1])
    assert same(vmap(norm)(x[None]), vmap(plain)(x[None]))


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e18, 1e30, float("inf"), float("nan")])
def test_extreme_inputs_while_observed(value: Any) -> None:
    bridge = models.bridged(models.olmo())
    norm = bridge.blocks[0].ln1
    norm.hook_scale.add_hook(lambda tensor, hook: None)
    norm.hook_scale.add_hook(lambda tensor, hook: None, dir="bwd")
    inputs = torch.linspace(-1, 1, 64).view(1, 2, 32) * value
    results = []
    for module in (models.olmo().model.norm, norm):
        x = inputs.clone().requires_grad_()
        output = module(x)
        models.backward(output)
        results.append((output, x.grad))
    assert all(map(same, *results))
