"""The clip patch against Hugging Face itself: bit for bit, in every dtype and mode."""

from __future__ import annotations

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
    run,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore:clip_qkv=")  # that the clamp is skipped


def test_clip_binds_and_leaves_some_entries_alone() -> None:
    model = build(None)
    outputs: list[torch.Tensor] = []
    for name in PROJECTIONS:
        getattr(attention(model), name).register_forward_hook(lambda *a: outputs.append(a[2]))
    model(TOKENS)
    for output in outputs:
        assert 0.05 < (output.abs() > CLIP).float().mean() < 0.95


@pytest.mark.parametrize("name", PROJECTIONS)
def test_raw_model_cannot_have_full_backward_hooks(name: str) -> None:
    model = build()
    getattr(attention(model), name).register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"BackwardHookFunction.* is being modified inplace"):
        model(TOKENS)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_default_is_the_reference_without_clip(implementation: str, train: bool) -> None:
    changes: dict[str, Any] = {"attn_implementation": implementation, "attention_dropout": 0.3}
    model = build(**changes).train(train)
    patch_clip(model)
    assert_same(run(model), run(build(None, **changes).train(train)))
    assert not torch.equal(run(model)["logits"], run(build(**changes).train(train))["logits"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "hooked"])
def test_exact_is_the_reference(dtype: torch.dtype, implementation: str, hooked: bool) -> None:
    changes: dict[str, Any] = {"attn_implementation": implementation, "attention_bias": True}
    model = build(**changes).to(dtype)
    patch_clip(model, exact_clip=True)
    if hooked:
        for name in PROJECTIONS:
            projection = getattr(attention(model), name)
            projection.register_full_backward_hook(lambda *_: None)
            projection.register_full_backward_pre_hook(lambda *_: None)
            projection.register_forward_hook(lambda *_: None)
    assert_same(run(model), run(build(**changes).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_is_the_reference_at_the_kink(dtype: torch.dtype) -> None:
    def at_the_kink() -> Any:
        model = build(attention_bias=True)
        with torch.no_grad():
            for name in PROJECTIONS:
                projection = getattr(attention(model), name)
                projection.weight[[0, 5]] = 0
                projection.bias[[0, 5]] = torch.tensor([CLIP, -CLIP])
        return model.to(dtype)

    expected = run(at_the_kink())
    # Until 2.13 PyTorch lets the gradient pass there, from 2.14 on no more.
    kink = torch.tensor([CLIP, -CLIP], requires_grad=True)
    (own,) = torch.autograd.grad(kink.clamp(-CLIP, CLIP).sum(), kink)
    for name in PROJECTIONS:
        seen = expected[f"model.layers.0.self_attn.{name}.bias"][[0, 5]]
        assert torch.equal(seen != 0, own != 0)
    model = at_the_kink()
    patch_clip(model, exact_clip=True)
    attention(model).q_proj.register_full_backward_hook(lambda *_: None)
    assert_same(run(model), expected)


def test_zero_is_a_clip() -> None:
    model = build(0.0)
    patch_clip(model, exact_clip=True)
    assert_same(run(model), run(build(0.0)))
    patch_clip(model)
    assert_same(run(model), run(build(None)))


@EXACT
def test_generation(exact: bool) -> None:
    def generate(model: Any) -> torch.Tensor:
        tokens = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
        assert isinstance(tokens, torch.Tensor)
        return tokens

    model = build()
    patch_clip(model, exact_clip=exact)
    assert torch.equal(generate(model), generate(build(CLIP if exact else None)))
    assert not torch.equal(generate(model), generate(build(None if exact else CLIP)))


@EXACT
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing(exact: bool, reentrant: bool) -> None:
    model = build().train()
    patch_clip(model, exact_clip=exact)
    before = snapshot(attention(model))
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    fired: list[torch.Tensor] = []
    handle = attention(model).q_proj.register_full_backward_hook(lambda *a: fired.append(a[2][0]))

    def backward_elsewhere(loss: torch.Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join(60)

    expected = run(build(CLIP if exact else None).train())
    assert_same(run(model, backward_elsewhere), expected)
    assert len(fired) == 1
    handle.remove()
    assert snapshot(attention(model))[""] == before[""]
