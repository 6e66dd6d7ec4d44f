"""The clip patch against Hugging Face itself: bit for bit, hooks alive, no residue."""

from __future__ import annotations

import copy
import inspect
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.model_bridge.supported_architectures.olmo import (
    OlmoArchitectureAdapter as UpstreamAdapter,
)
from transformers import OlmoConfig, OlmoForCausalLM, OlmoModel

from adapter.clip import patch_clip, unpatch_model

CLIP = 0.25  # exact in every dtype
TOKENS = torch.tensor([[1, 5, 9, 2, 7, 7], [3, 8, 0, 4, 4, 6]])
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["default", "exact"])

Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet_about_the_skipped_clamp() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="clip_qkv=")
        yield


def build(clip: float | None = CLIP, **changes: Any) -> Any:
    """One fixed set of weights, whatever the clip; wide enough for it to bind."""
    settings: dict[str, Any] = {
        "vocab_size": 12,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = OlmoConfig(**{**settings, **changes}, clip_qkv=clip)
    torch.manual_seed(0)
    model: Any = OlmoForCausalLM(config)
    return model.eval()


def attention(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].self_attn


def run(model: Any, backward: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> Results:
    """Logits, loss and every gradient; the same dropout each time."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(TOKENS, labels=TOKENS, use_cache=False)
    backward(output.loss)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


def assert_same(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    differ = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not differ


def snapshot(model: Any) -> dict[str, Any]:
    """Every module's class and attributes, by identity and in order; hooks and submodules too."""
    return {
        name: (
            type(module),
            [(key, id(value)) for key, value in vars(module).items()],
            [(key, list(value)) for key, value in vars(module).items() if isinstance(value, dict)],
        )
        for name, module in model.named_modules()
    }


def on_q_proj(model: Any, action: Callable[[], object], layer: int = 0) -> Any:
    """Call ``action`` from within the attention's forward."""

    def hook(*_: object) -> None:
        action()

    return attention(model, layer).q_proj.register_forward_hook(hook)


def bridged(model: Any) -> TransformerBridge:
    config = build_bridge_config_from_hf(model.config, "OlmoForCausalLM", "olmo", torch.float32)
    config.device = "cpu"
    return TransformerBridge(model, UpstreamAdapter(config), None)


# ---------------------------------------------------------------- why there is a patch, and values


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


# ------------------------------------------------------------------------------------ users' hooks


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


# -------------------------------------------------------------------- what is visible, and to whom


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


# --------------------------------------------------------------------- on, off, again, and copies


@EXACT
def test_unpatch_leaves_no_residue(exact: bool) -> None:
    model = build()
    attention(model).q_proj.register_forward_hook(lambda *_: None)
    attention(model, 1).forward = attention(model, 1).forward  # an instance's own, as others leave
    run(model)
    before, keys = snapshot(model), list(model.state_dict())
    patch_clip(model, exact_clip=exact)
    assert snapshot(model) != before
    assert list(model.state_dict()) == keys
    run(model)
    assert list(model.state_dict()) == keys
    unpatch_model(model)
    assert snapshot(model) == before
    assert_same(run(model), run(build()))


def test_unpatch_without_a_patch_does_nothing() -> None:
    model = build()
    before = snapshot(model)
    unpatch_model(model)
    assert snapshot(model) == before
    unpatch_model(SimpleNamespace())


@EXACT
def test_patching_twice_is_patching_once(exact: bool) -> None:
    model = build()
    before = snapshot(model)
    patch_clip(model, exact_clip=exact)
    once = snapshot(model)
    patch_clip(model, exact_clip=exact)
    assert snapshot(model) == once
    unpatch_model(model)
    assert snapshot(model) == before


@EXACT
def test_the_last_mode_wins(exact: bool) -> None:
    model = build()
    before = snapshot(model)
    patch_clip(model, exact_clip=not exact)
    run(model)
    patch_clip(model, exact_clip=exact)
    assert_same(run(model), run(build(CLIP if exact else None)))
    unpatch_model(model)
    assert snapshot(model) == before


@EXACT
def test_without_clip_nothing_happens(exact: bool) -> None:
    model = build(None)
    before = snapshot(model)
    patch_clip(model, exact_clip=exact)
    assert snapshot(model) == before
    patch_clip(SimpleNamespace(), exact_clip=exact)


@EXACT
@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_are_patched_and_independent(exact: bool, how: str) -> None:
    def duplicate(model: Any) -> Any:
        if how == "deepcopy":
            return copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = build()
    patch_clip(model, exact_clip=exact)
    expected = run(model)
    twin = duplicate(model)
    assert_same(run(twin), expected)
    with torch.no_grad():
        attention(model).q_proj.weight.zero_()
        attention(model).q_proj.register_forward_hook(lambda *_: pytest.fail("crossed over"))
    assert_same(run(twin), expected)
    unpatch_model(twin)
    assert_same(run(twin), run(build()))
    assert "forward" not in vars(attention(twin))
    assert "forward" in vars(attention(model))


@EXACT
def test_copy_taken_during_a_forward(exact: bool) -> None:
    copies: list[Any] = []
    model = build()
    patch_clip(model, exact_clip=exact)
    handle = on_q_proj(model, lambda: copies.append(copy.deepcopy(model)))
    model(TOKENS)
    handle.remove()
    twin = copies[0]
    attention(twin).q_proj._forward_hooks.clear()
    assert attention(twin).config is twin.config
    assert attention(twin).config.clip_qkv == CLIP
    assert isinstance(attention(twin).q_proj, torch.nn.Linear)
    assert_same(run(twin), run(build(CLIP if exact else None)))


@EXACT
def test_a_wrapper_put_on_afterwards_survives(exact: bool) -> None:
    calls: list[int] = []
    model = build()
    patch_clip(model, exact_clip=not exact)
    patched = attention(model).forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return patched(*args, **kwargs)

    attention(model).forward = wrapper
    patch_clip(model, exact_clip=exact)
    assert_same(run(model), run(build(CLIP if exact else None)))
    unpatch_model(model)
    assert_same(run(model), run(build()))
    assert attention(model).forward is wrapper
    assert len(calls) == 2


@EXACT
def test_unpatch_beneath_a_wrapper_lets_calls_through(exact: bool) -> None:
    model = build()
    patch_clip(model, exact_clip=exact)
    patched = attention(model).forward
    attention(model).forward = lambda *args, **kwargs: patched(*args, **kwargs)
    unpatch_model(model)
    assert_same(run(model), run(build()))
    attention(model).q_proj.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="is being modified inplace"):
        model(TOKENS)


@EXACT
def test_accelerate_hooks_before_and_after(exact: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build()
    hooks.add_hook_to_module(attention(model, 0), hooks.ModelHook())
    patch_clip(model, exact_clip=exact)
    hooks.add_hook_to_module(attention(model, 1), hooks.ModelHook())
    expected = run(build(CLIP if exact else None))
    assert_same(run(model), expected)
    for layer in (0, 1):  # takes the patch off layer 0 with it, and leaves it on layer 1
        hooks.remove_hook_from_module(attention(model, layer))
    patch_clip(model, exact_clip=exact)
    assert_same(run(model), expected)
    unpatch_model(model)
    assert_same(run(model), run(build()))


# ----------------------------------------------------------------------------------------- warning


def standalone_warnings(action: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "clip_qkv" in str(w.message)]


def test_first_standalone_forward_warns_once() -> None:
    model = build()
    assert standalone_warnings(lambda: patch_clip(model)) == []
    (message,) = standalone_warnings(lambda: model(TOKENS))
    assert str(CLIP) in message
    assert "prepare_model(hf_model, exact_clip=True)" in message
    patch_clip(model)
    assert standalone_warnings(lambda: model(TOKENS)) == []
    other = build()
    patch_clip(other)
    assert len(standalone_warnings(lambda: other(TOKENS))) == 1


@EXACT
def test_only_a_skipped_clamp_warns(exact: bool) -> None:
    model = build(CLIP if exact else None)
    patch_clip(model, exact_clip=exact)
    assert standalone_warnings(lambda: model(TOKENS)) == []


def test_a_clip_taken_away_since_does_not_warn() -> None:
    model = build()
    patch_clip(model)
    model.config.clip_qkv = None
    assert standalone_warnings(lambda: model(TOKENS)) == []


def test_a_copy_warns_again() -> None:
    model = build()
    patch_clip(model)
    model(TOKENS)
    twin = copy.deepcopy(model)
    assert len(standalone_warnings(lambda: (twin(TOKENS), twin(TOKENS)))) == 1


def test_warning_as_error_leaves_nothing() -> None:
    model = build()
    patch_clip(model)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="clip_qkv"):
            model(TOKENS)
    assert snapshot(model) == before
    assert_same(run(model), run(build(None)))


# ---------------------------------------------------------------------------------------- bridging


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


# --------------------------------------------------------------- other shapes of model, and errors


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
