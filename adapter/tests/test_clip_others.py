"""The clip patch on bridged models, on other shapes of model, and where it refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import OlmoModel

from adapter.clip import patch_clip, unpatch_model
from adapter.tests.clipped import (
    CLIP,
    EXACT,
    TOKENS,
    assert_same,
    attention,
    bridged,
    build,
    run,
    snapshot,
    standalone_warnings,
)

pytestmark = pytest.mark.filterwarnings("ignore:clip_qkv=")  # that the clamp is skipped


@EXACT
def test_bridge_around_a_patched_model_clamps_and_is_silent(exact: bool) -> None:
    model = build()
    patch_clip(model, exact_clip=exact)
    bridge = bridged(model)
    logits: list[Any] = []
    messages = standalone_warnings(lambda: logits.extend([bridge(TOKENS), model(TOKENS).logits]))
    assert messages == []
    expected = run(build())["logits"]
    assert torch.equal(logits[0], expected)
    assert torch.equal(logits[1], expected)


@EXACT
def test_bridge_after_a_standalone_forward_still_clamps(exact: bool) -> None:
    model = build()
    patch_clip(model, exact_clip=exact)
    model(TOKENS)
    assert torch.equal(bridged(model)(TOKENS), run(build())["logits"])


@EXACT
@pytest.mark.parametrize("given", ["model", "bridge"])
def test_bridged_model_is_left_alone(exact: bool, given: str) -> None:
    model = build()
    bridge = bridged(model)
    subject = model if given == "model" else bridge
    before = snapshot(model)
    patch_clip(subject, exact_clip=exact)
    assert snapshot(model) == before
    unpatch_model(subject)
    assert snapshot(model) == before


def test_unpatch_reaches_inside_of_a_bridge() -> None:
    model = build()
    raw = attention(model)
    before = dict(vars(raw))
    patch_clip(model)
    bridged(model)
    assert "forward" in vars(raw)
    unpatch_model(model)
    assert dict(vars(raw)) == before


class FakeAttention:
    """Clamps as Hugging Face does, and is no module."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.q_proj: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
        self.k_proj = self.v_proj = self.q_proj

    def forward(self, x: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        states = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.config.clip_qkv is not None:
            states = [s.clamp_(-self.config.clip_qkv, self.config.clip_qkv) for s in states]
        return self.config.clip_qkv, states


def fake_model(*attentions: Any, clip: float | None = 1.0) -> Any:
    layers = [SimpleNamespace(self_attn=attn) for attn in attentions]
    config = SimpleNamespace(clip_qkv=clip)
    return SimpleNamespace(config=config, model=SimpleNamespace(layers=layers))


def test_plain_object() -> None:
    config = SimpleNamespace(clip_qkv=1.0)
    attn = FakeAttention(config)
    before = dict(vars(attn))
    model = fake_model(attn)
    x = torch.tensor([-2.0, 0.5, 2.0])
    patch_clip(model)
    clip, states = attn.forward(x)
    assert clip is None
    assert torch.equal(states[0], x)
    patch_clip(model, exact_clip=True)
    clip, states = attn.forward(x)
    assert clip == 1.0
    assert torch.equal(states[0], x.clamp(-1, 1))
    assert x.abs().max() == 2.0
    unpatch_model(model)
    assert vars(attn) == before
    assert config.clip_qkv == 1.0


@pytest.mark.parametrize("kind", [SimpleNamespace, Mock])
def test_namespaces_and_mocks(kind: Callable[..., Any]) -> None:
    seen: list[Any] = []
    attn = kind(config=SimpleNamespace(clip_qkv=1.0))
    attn.forward = lambda *_: seen.append(attn.config.clip_qkv)
    original = attn.forward
    model = kind(config=attn.config, model=kind(layers=[kind(self_attn=attn)]))
    patch_clip(model)
    attn.forward("x")
    assert attn.config is model.config
    unpatch_model(model)
    assert attn.forward is original
    attn.forward("x")
    assert seen == [None, 1.0]


def test_mock_whose_forward_is_a_mock() -> None:
    attn = Mock()
    original = attn.forward
    model = fake_model(attn)
    patch_clip(model)
    attn.forward(1, two=2)
    original.assert_called_once_with(1, two=2)
    unpatch_model(model)
    assert attn.forward is original


def test_attention_without_a_config_reads_none() -> None:
    seen: list[Any] = []
    attn = SimpleNamespace()
    attn.forward = lambda: seen.append(attn.config.clip_qkv)
    patch_clip(fake_model(attn))
    attn.forward()
    assert seen == [None]
    assert not hasattr(attn, "config")


def test_one_attention_in_two_layers() -> None:
    attn = FakeAttention(SimpleNamespace(clip_qkv=1.0))
    before = dict(vars(attn))
    model = fake_model(attn, attn)
    patch_clip(model)
    patch_clip(model)
    assert attn.forward(torch.ones(1))[0] is None
    unpatch_model(model)
    assert vars(attn) == before


def test_model_without_head() -> None:
    expected: Any = OlmoModel(build(None).config)
    model: Any = OlmoModel(build().config)
    model.load_state_dict(expected.state_dict())
    patch_clip(model)
    assert torch.equal(model(TOKENS).last_hidden_state, expected(TOKENS).last_hidden_state)
    unpatch_model(model)
    assert "forward" not in vars(model.layers[0].self_attn)


@EXACT
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_peft(exact: bool) -> None:
    peft = pytest.importorskip("peft")

    def adapted(clip: float | None) -> Any:
        settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = build(clip)
        torch.manual_seed(2)
        return peft.get_peft_model(model, settings)

    model = adapted(CLIP)
    attn = model.base_model.model.model.layers[0].self_attn
    q_proj = attn.q_proj
    before, keys = snapshot(attn), list(model.state_dict())
    patch_clip(model, exact_clip=exact)
    assert type(q_proj).__module__.startswith("peft.")
    fired: list[object] = []
    handle = q_proj.register_full_backward_hook(lambda *_: fired.append(1))
    assert_same(run(model), run(adapted(CLIP if exact else None)))
    assert fired == [1]
    handle.remove()
    assert list(model.state_dict()) == keys
    unpatch_model(model)
    assert snapshot(attn)[""] == before[""]
    assert_same(run(model), run(adapted(CLIP)))


class PropertyAttention(FakeAttention):
    config = property(lambda self: self.hidden, lambda self, value: vars(self).update(hidden=value))


class SlotsAttention:
    __slots__ = ("config",)

    def forward(self) -> None: ...


@pytest.mark.parametrize(
    ("broken", "exact", "error", "named"),
    [
        (None, False, AttributeError, r"no model\.layers\[1\]\.self_attn"),
        (SimpleNamespace(config=None), False, AttributeError, r"\[1\].* no callable forward"),
        (
            SimpleNamespace(forward=print, q_proj=print),
            True,
            AttributeError,
            r"\[1\].* no callable k_proj, v_proj",
        ),
        (PropertyAttention(None), False, TypeError, r"\[1\].*PropertyAttention.* config be repl"),
        (SlotsAttention(), False, TypeError, r"\[1\].*SlotsAttention.* config be replaced"),
    ],
    ids=["no-attention", "no-forward", "no-projections", "property", "slots"],
)
def test_refuses_before_anything_is_touched(
    broken: Any, exact: bool, error: type[Exception], named: str
) -> None:
    good = FakeAttention(SimpleNamespace(clip_qkv=1.0))
    before = dict(vars(good))
    with pytest.raises(error, match=named):
        patch_clip(fake_model(good, broken), exact_clip=exact)
    assert vars(good) == before


def test_refusal_of_a_mode_leaves_the_earlier_one_in_place() -> None:
    attn = SimpleNamespace(config=SimpleNamespace(clip_qkv=1.0))
    attn.forward = lambda: attn.config.clip_qkv
    model = fake_model(attn)
    patch_clip(model)
    with pytest.raises(AttributeError, match="q_proj, k_proj, v_proj"):
        patch_clip(model, exact_clip=True)
    assert attn.forward() is None


def test_model_without_layers() -> None:
    model = SimpleNamespace(config=SimpleNamespace(clip_qkv=1.0), model=SimpleNamespace())
    with pytest.raises(AttributeError, match=r"none of model\.layers, layers, model\.model\.layer"):
        patch_clip(model)
    patch_clip(build(num_hidden_layers=0), exact_clip=True)
