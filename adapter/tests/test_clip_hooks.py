"""The clip patch under users' hooks, and what they can see of it during a forward."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch

from adapter.clip import patch_clip
from adapter.tests.clipped import (
    CLIP,
    EXACT,
    PROJECTIONS,
    TOKENS,
    assert_same,
    attention,
    build,
    on_q_proj,
    run,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore:clip_qkv=")  # that the clamp is skipped


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("early", [False, True], ids=["hook-after-patch", "hook-before-patch"])
@EXACT
def test_full_backward_hook_sees_the_preclip_gradient(name: str, early: bool, exact: bool) -> None:
    model = build(attention_bias=True).double()
    projection = getattr(attention(model), name)
    seen: dict[str, torch.Tensor] = {}

    def keep_gradient(_: Any, __: Any, gradient: tuple[torch.Tensor, ...]) -> None:
        assert "gradient" not in seen, "fired twice"
        seen["gradient"] = gradient[0]

    def keep_output(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.update(input=inputs[0], output=output)

    if not early:
        patch_clip(model, exact_clip=exact)
    projection.register_full_backward_hook(keep_gradient)
    projection.register_forward_hook(keep_output)
    if early:
        patch_clip(model, exact_clip=exact)
    run(model)
    expected = run(build(CLIP if exact else None, attention_bias=True).double())
    gradient = seen["gradient"].flatten(0, 1)
    # The gradients of weight and bias follow from that of the output: an independent witness.
    path = f"model.layers.0.self_attn.{name}"
    weight = gradient.T @ seen["input"].flatten(0, 1)
    torch.testing.assert_close(weight, expected[f"{path}.weight"], atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient.sum(0), expected[f"{path}.bias"], atol=1e-12, rtol=0)
    clipped = seen["output"].flatten(0, 1).abs() > CLIP
    assert clipped.any()
    assert bool((gradient[clipped] == 0).all()) == exact


@pytest.mark.parametrize("grad", [False, True])
def test_exact_leaves_captured_outputs_alone(grad: bool) -> None:
    def capture(model: Any) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        attention(model).q_proj.register_forward_hook(lambda *a: outputs.append(a[2]))
        with torch.set_grad_enabled(grad):
            model(TOKENS)
        return outputs[0]

    model = build()
    patch_clip(model, exact_clip=True)
    assert capture(build()).abs().max() <= CLIP  # what happens without
    assert torch.equal(capture(model), capture(build(None)))


def test_exact_clips_what_a_forward_hook_returns() -> None:
    models = build(), build()
    patch_clip(models[0], exact_clip=True)
    for model in models:
        attention(model).k_proj.register_forward_hook(lambda *a: a[2] * 2 - 0.1)
    assert_same(run(models[0]), run(models[1]))
    assert not torch.equal(run(models[0])["logits"], run(build())["logits"])


def test_hook_may_return_a_gradient_in_exact_mode() -> None:
    model = build()
    patch_clip(model, exact_clip=True)
    attention(model).v_proj.register_full_backward_pre_hook(lambda _, g: (g[0] * 0,))
    assert not run(model)["model.layers.0.self_attn.v_proj.weight"].any()


def test_config_says_none_during_the_forward_only() -> None:
    model = build()
    patch_clip(model)
    shared = model.config.to_dict()
    seen: list[Any] = []

    def look() -> None:
        own, other = attention(model, 0).config, attention(model, 1).config
        seen.append((own.clip_qkv, other.clip_qkv, model.config.clip_qkv, own.hidden_size))

    on_q_proj(model, look)
    model(TOKENS)
    assert seen == [(None, CLIP, CLIP, 16)]
    assert all(attention(model, layer).config is model.config for layer in (0, 1))
    assert model.config.to_dict() == shared


def test_writing_to_the_config_during_the_forward_reaches_the_real_one() -> None:
    model = build()
    patch_clip(model)
    on_q_proj(model, lambda: setattr(attention(model).config, "note", "written"))
    model(TOKENS)
    assert model.config.note == "written"


def test_a_config_set_during_the_forward_stays() -> None:
    model, other = build(), build().config
    patch_clip(model)
    on_q_proj(model, lambda: setattr(attention(model), "config", other))
    model(TOKENS)
    assert attention(model).config is other


def test_projections_are_the_real_ones_outside_of_the_forward() -> None:
    model = build()
    before = dict(attention(model).named_children())
    patch_clip(model, exact_clip=True)
    model(TOKENS)
    assert all(getattr(attention(model), name) is before[name] for name in PROJECTIONS)
    assert not set(PROJECTIONS) & set(vars(attention(model)))


def test_signature_of_forward_is_hugging_faces() -> None:
    model = build()
    patch_clip(model)
    assert inspect.signature(attention(model).forward) == inspect.signature(
        attention(build()).forward
    )


@EXACT
def test_exception_leaves_nothing(exact: bool) -> None:
    model = build()
    patch_clip(model, exact_clip=exact)
    before = snapshot(model)

    def fail() -> None:
        raise KeyError("on purpose")

    handle = on_q_proj(model, fail)
    with pytest.raises(KeyError, match="on purpose"):
        model(TOKENS)
    handle.remove()
    assert snapshot(model) == before
    assert_same(run(model), run(build(CLIP if exact else None)))


@EXACT
def test_nested_forward_of_the_same_model(exact: bool) -> None:
    inner: list[torch.Tensor] = []
    model = build()
    patch_clip(model, exact_clip=exact)
    before = snapshot(model)

    def once_more() -> None:
        handle.remove()
        inner.append(model(TOKENS, use_cache=False).logits.detach())

    handle = on_q_proj(model, once_more)
    expected = run(build(CLIP if exact else None))
    assert_same(run(model), expected)
    assert torch.equal(inner[0], expected["logits"])
    assert snapshot(model) == before


@EXACT
def test_threads_inside_the_same_attention(exact: bool) -> None:
    """Both are inside at once; the first leaves while the second has yet to reach the clamp."""
    model = build()
    patch_clip(model, exact_clip=exact)
    before = snapshot(model)
    both_inside, first_done = threading.Barrier(3, timeout=60), threading.Event()
    logits: dict[str, torch.Tensor] = {}
    seen: list[Any] = []

    def meet() -> None:
        both_inside.wait()
        both_inside.wait()
        if threading.current_thread().name == "second":
            assert first_done.wait(60)
        seen.append(attention(model).config.clip_qkv)

    def forward() -> None:
        with torch.no_grad():
            logits[threading.current_thread().name] = model(TOKENS, use_cache=False).logits

    handle = on_q_proj(model, meet)
    threads = [threading.Thread(target=forward, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    both_inside.wait()
    outside = attention(model).config.clip_qkv
    both_inside.wait()
    threads[0].join(60)
    first_done.set()
    threads[1].join(60)
    handle.remove()

    assert outside == CLIP
    assert seen == [CLIP if exact else None] * 2
    expected = run(build(CLIP if exact else None))["logits"]
    assert torch.equal(logits["first"], expected)
    assert torch.equal(logits["second"], expected)
    assert snapshot(model) == before


@EXACT
def test_many_threads(exact: bool) -> None:
    model = build()
    patch_clip(model, exact_clip=exact)
    before = snapshot(model)
    expected = run(build(CLIP if exact else None))["logits"]
    right: list[bool] = []

    def work() -> None:
        for _ in range(15):
            logits = model(TOKENS, use_cache=False).logits
            logits.sum().backward()
            right.append(torch.equal(logits, expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(right) == 60
    assert all(right)
    assert snapshot(model) == before
