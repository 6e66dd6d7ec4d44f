"""Facts about torch, transformers and transformer_lens that the kit rests on.

A red test here says that the environment has changed, and what to think through again: not that an
adapter is wrong.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from adapter import OlmoArchitectureAdapter
from conformance.checks.gradients import IN_PLACE_ERROR
from conformance.inputs import derived_positions, inputs
from conformance.observe import observe
from conformance.sites import Site, observable
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.subjects import Subject, bridged, reference
from conformance.taps import Taps

torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other

MODEL = ModelSpec(num_hidden_layers=2, weight_seed=4)
CLIPPED = replace(MODEL, clip_qkv=0.5)
CASE = Case(model=MODEL, run=RunSpec(batch=2, seq_len=6, token_seed=3))


def logits(subject: Subject, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = subject.model(tokens, use_cache=False, **given).logits
    return found


def at(hook: str) -> dict[str, Site]:
    return {name: site for name, site in observable(MODEL).items() if name.endswith(hook)}


@pytest.fixture
def tokens() -> torch.Tensor:
    return inputs(CASE).tokens


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_equal_models_agree_bit_for_bit(dtype: str) -> None:
    """Zero tolerance is the standard: also with dropout, from equal random states."""
    model = replace(CLIPPED, dtype=dtype, attention_dropout=0.3)
    case = replace(CASE, model=model, run=replace(CASE.run, training=True))
    one, two = observe(reference(model), case), observe(reference(model), case)
    assert torch.equal(one.logits, two.logits)
    for name, gradient in one.parameter_gradients.items():
        other = two.parameter_gradients[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_a_model_is_what_hugging_face_loads(rope: str, tied: bool, tmp_path: Path) -> None:
    """The kit skips Hugging Face's drawing of weights: nothing else must be skipped with it."""
    model = replace(CLIPPED, dtype="bfloat16", rope_type=rope, tie_word_embeddings=tied)
    before = torch.get_rng_state()
    built = reference(model).model
    assert torch.equal(torch.get_rng_state(), before)
    built.save_pretrained(tmp_path)
    loaded = type(built).from_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = dict(built.named_buffers()) | dict(built.named_parameters(remove_duplicate=False))
    due = dict(loaded.named_buffers()) | dict(loaded.named_parameters(remove_duplicate=False))
    assert list(tensors) == list(due)
    assert all(torch.equal(tensor, due[name]) for name, tensor in tensors.items())
    assert (built.lm_head.weight is built.model.embed_tokens.weight) is tied


def test_a_clip_and_a_full_backward_hook_crash_the_raw_model(tokens: torch.Tensor) -> None:
    """The reason why the patch exists."""
    raw = reference(CLIPPED).model
    raw.model.layers[0].self_attn.q_proj.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=IN_PLACE_ERROR):
        raw(tokens)


def test_the_clamp_overwrites_what_a_forward_hook_has_seen(tokens: torch.Tensor) -> None:
    """So whoever keeps a projection's output must clone it."""
    subject = reference(CLIPPED)
    seen: list[torch.Tensor] = []
    subject.model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, into, out: seen.extend([out, out.clone()])
    )
    logits(subject, tokens)
    kept, cloned = seen
    assert torch.equal(kept, cloned.clamp(-0.5, 0.5))
    assert not torch.equal(kept, cloned)


def test_a_clip_of_zero_is_a_clamp(tokens: torch.Tensor) -> None:
    total = logits(reference(replace(MODEL, clip_qkv=0.0)), tokens)
    assert not torch.equal(total, logits(reference(MODEL), tokens))


def test_all_attentions_share_the_model_s_configuration() -> None:
    """So nothing may ever be written to it, not even for a moment."""
    model = reference(CLIPPED).model
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_a_clamp_in_place_has_the_gradient_of_one_out_of_place() -> None:
    # At the kink it is 1 until PyTorch 2.13 and 0 from 2.14 on; Hugging Face clamps in place, a
    # bridge out of place, and both must say the same.
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0], requires_grad=True)
    (out_of_place,) = torch.autograd.grad(x.clamp(-1, 1).sum(), x)
    (in_place,) = torch.autograd.grad((x * 1).clamp_(-1, 1).sum(), x)
    assert torch.equal(in_place, out_of_place)
    assert out_of_place.tolist() in ([0, 1, 1, 0], [0, 0, 0, 0])


def test_bridging_changes_the_wrapped_model(tokens: torch.Tensor) -> None:
    """So it is never the reference: hooks of the bridge fire in a forward of the model itself."""
    subject = bridged(MODEL, OlmoArchitectureAdapter)
    assert subject.bridge is not None
    assert isinstance(subject.model.model.layers[0].self_attn, GeneralizedComponent)
    assert set(dict(subject.model.named_parameters())) != set(subject.parameters)
    fired: list[str] = []
    subject.bridge.hook_dict["blocks.0.attn.hook_pattern"].add_hook(
        lambda tensor, hook: fired.append(hook.name)
    )
    logits(subject, tokens)
    assert fired == ["blocks.0.attn.hook_pattern"]


def test_a_cache_changes_how_the_reference_rounds() -> None:
    """So ``use_cache`` is the same on both sides: with no groups it changes the keys' layout."""
    tokens = torch.arange(3 * 24).reshape(3, 24) % MODEL.vocab_size
    gradients = []
    for cached in (True, False):
        subject = reference(MODEL)
        subject.model(tokens, use_cache=cached).logits.sum().backward()
        gradient = subject.parameters["model.layers.0.self_attn.k_proj.weight"].grad
        assert gradient is not None
        gradients.append(gradient)
    with_cache, without = gradients
    assert not torch.equal(with_cache, without)
    torch.testing.assert_close(with_cache, without, rtol=1e-3, atol=1e-3)


def test_sdpa_rounds_otherwise(tokens: torch.Tensor) -> None:
    """So the reference attends eagerly."""
    subject = reference(MODEL)
    eager = logits(subject, tokens)
    subject.model.set_attn_implementation("sdpa")
    sdpa = logits(subject, tokens)
    assert not torch.equal(eager, sdpa)
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-4)


def test_a_constant_added_to_all_scores_changes_nothing(tokens: torch.Tensor) -> None:
    """An edit can be rightly null: ask for the reference's effect, not for any effect."""
    subject = reference(MODEL)
    before = logits(subject, tokens)
    taps = Taps(
        subject.model,
        at("hook_attn_scores"),
        lambda name, tensor: tensor + 1,
        d_head=MODEL.d_head,
        clamps=False,
    )
    with taps.attached():
        after = logits(subject, tokens)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_position_zero_is_not_rotated() -> None:
    """So a run of one token hides every fault of the rotation."""
    rotary = reference(MODEL).model.model.rotary_emb
    cos, sin = rotary(torch.zeros(1, 1, MODEL.hidden_size), torch.zeros(1, 1, dtype=torch.long))
    assert bool((cos == 1).all())
    assert bool((sin == 0).all())


def test_attention_does_not_see_a_shift_of_all_positions(tokens: torch.Tensor) -> None:
    """So plain left padding hides faults of the positions; gaps and the rotated q, k show them."""
    subject = reference(MODEL)
    positions = torch.arange(tokens.shape[1])[None]
    shifted = logits(subject, tokens, position_ids=positions + 7)
    expected = logits(subject, tokens, position_ids=positions)
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-4)


def test_hugging_face_s_own_positions_ignore_the_mask(tokens: torch.Tensor) -> None:
    """So the reference is given ``cumsum(mask) - 1``."""
    subject = reference(MODEL)
    mask = torch.ones_like(tokens)
    mask[:, 2] = 0
    ignored = logits(subject, tokens, attention_mask=mask)
    counted = logits(subject, tokens, attention_mask=mask, position_ids=derived_positions(mask))
    assert float((ignored - counted)[:, 3:].abs().max()) > 0.1


def test_hugging_face_normalizes_and_attends_in_float32() -> None:
    """So float64 is precise to float32 only, and gradcheck fails on Hugging Face's own model."""
    subject = reference(replace(MODEL, dtype="float64"))
    x = torch.randn(2, 3, MODEL.hidden_size, dtype=torch.float64)
    due = F.layer_norm(x.float(), (MODEL.hidden_size,), eps=1e-5).double()
    assert torch.equal(subject.model.model.norm(x), due)
    case = replace(CASE, model=replace(MODEL, dtype="float64"))
    seen = observe(subject, case, sites=at("hook_pattern"), backward=False).values
    for pattern in seen.values():
        assert pattern.dtype == torch.float64
        assert torch.equal(pattern, pattern.float().double())


def test_a_query_that_sees_no_key_is_nan_in_float64(tokens: torch.Tensor) -> None:
    """So strategies draw no left padding there: Hugging Face's own model makes NaN of it."""
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    for dtype, blind in (("float32", False), ("float64", True)):
        found = logits(reference(replace(MODEL, dtype=dtype)), tokens, attention_mask=mask)
        assert bool(found.isnan().any()) is blind


def test_a_backward_hook_makes_a_new_object_of_a_tensor() -> None:
    """So ``is`` does not tell an observed tensor from an edited one."""
    point = HookPoint()  # type: ignore[no-untyped-call]
    x = torch.ones(1, requires_grad=True)
    assert point(x) is x
    point.add_hook(lambda gradient, hook: None, dir="bwd")
    assert point(x) is not x
