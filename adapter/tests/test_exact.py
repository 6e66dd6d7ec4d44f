"""A bridged OLMo computes what Hugging Face's computes, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapter.tests import models
from adapter.tests.models import DTYPES, SHAPES, TOKENS, same

FLAGS = ["use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in"]


@pytest.mark.parametrize(
    ("cache", "mask", "hooked"),
    [(True, None, False), (False, models.GAP, True), (True, models.LEFT, True)],
    ids=["bare", "gap-observed", "left-observed"],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_gradients(dtype: Any, shape: Any, cache: Any, mask: Any, hooked: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, **SHAPES[shape])
    if hooked:
        models.observe_everything(bridge)
    padding = {} if mask is None else {"attention_mask": mask}
    where = {} if mask is None else {"position_ids": models.positions(mask)}
    expected = reference(TOKENS, use_cache=cache, **padding, **where).logits
    logits = bridge(TOKENS, use_cache=cache, **padding, **where)
    assert same(logits, expected)
    models.backward(expected)
    models.backward(logits)
    assert models.same_gradients(reference, bridge)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(dtype: Any, checkpointing: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, attention_dropout=0.3, clip_qkv=0.5)
    outputs = []
    for model in (reference, bridge):
        model.train()
        if checkpointing:
            getattr(model, "original_model", model).gradient_checkpointing_enable()
        torch.manual_seed(1)
        logits = model(TOKENS)
        outputs.append(logits if model is bridge else logits.logits)
        models.backward(outputs[-1])
    assert same(*outputs)
    assert models.same_gradients(reference, bridge)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flags_change_nothing_without_an_edit(dtype: Any, flag: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, **SHAPES["gqa-clip-bias"])
    setattr(bridge.cfg, flag, True)
    models.observe_everything(bridge)
    expected, logits = reference(TOKENS).logits, bridge(TOKENS)
    assert same(logits, expected)
    models.backward(expected)
    models.backward(logits)
    assert models.same_gradients(reference, bridge)


@pytest.mark.parametrize("flag", [None, *FLAGS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype: Any, flag: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, **SHAPES["gqa-clip-bias"])
    if flag is not None:
        setattr(bridge.cfg, flag, True)
    seen = []
    bridge.hook_dict["blocks.1.attn.hook_attn_scores"].add_hook(
        lambda tensor, hook: seen.append(tensor.dtype)
    )
    # Queries before the first token see no key: every score of theirs is the lowest number, of
    # which Hugging Face's float64 model makes NaN.
    masked = dtype != torch.float64
    padding = {"attention_mask": models.LEFT} if masked else {}
    where = models.positions(models.LEFT) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(TOKENS, position_ids=where, **padding).logits
        logits = bridge(TOKENS, **padding)
    assert same(logits, expected)
    assert bool(logits.isfinite().all())
    assert seen == [torch.promote_types(dtype, torch.bfloat16)]
    models.backward(expected)
    models.backward(logits)
    assert models.same_gradients(reference, bridge)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cache_is_hugging_face_s(dtype: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, **SHAPES["gqa-clip-bias"])
    expected = reference(TOKENS, use_cache=True).past_key_values
    cache = bridge.original_model(TOKENS, use_cache=True).past_key_values
    for mine, theirs in zip(cache.layers, expected.layers, strict=True):
        assert same(mine.keys, theirs.keys)
        assert same(mine.values, theirs.values)
    more = torch.tensor([[1], [2]])
    step = bridge.original_model(more, past_key_values=cache).logits
    assert same(step, reference(more, past_key_values=expected).logits)


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "asked-before-bridging"])
def test_output_attentions(before: Any) -> None:
    reference, model = models.olmo(num_key_value_heads=2), models.olmo(num_key_value_heads=2)
    if before:
        model(TOKENS, output_attentions=True)
    models.bridged(model)
    expected = reference(TOKENS, output_attentions=True).attentions
    attentions = model(TOKENS, output_attentions=True).attentions
    assert len(attentions) == 2
    assert all(map(same, attentions, expected))


def test_output_hidden_states_are_what_hooks_leave() -> None:
    reference, bridge = models.pair(num_hidden_layers=3)
    reference.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    expected = reference(TOKENS, output_hidden_states=True).hidden_states
    with bridge.hooks([("blocks.0.hook_resid_post", lambda tensor, hook: tensor * 2)]):
        states = bridge.original_model(TOKENS, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert all(map(same, states, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_attention_called_alone(dtype: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, **SHAPES["gqa-clip-bias"])
    bridge.adapter.setup_component_testing(bridge.original_model, bridge)
    hidden = torch.randn(2, 6, 32).to(dtype)
    rotary = reference.model.rotary_emb(hidden, torch.arange(6)[None])
    mask = torch.full((1, 1, 6, 6), torch.finfo(dtype).min, dtype=dtype).triu(1)
    expected = reference.model.layers[1].self_attn(hidden, rotary, mask)[0]
    attention = bridge.blocks[1].attn
    assert same(attention(hidden, position_embeddings=rotary)[0], expected)
    assert same(attention(hidden)[0], expected)
    attention.set_rotary_emb(None)
    with pytest.raises(ValueError, match="position_embeddings"):
        attention(hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_attention_called_alone_by_position_and_at_positions(dtype: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, **SHAPES["gqa-clip-bias"])
    bridge.adapter.setup_component_testing(bridge.original_model, bridge)
    hidden, positions = torch.randn(2, 6, 32).to(dtype), torch.tensor([[0, 0, 1, 3, 4, 9]])
    rotary = reference.model.rotary_emb(hidden, positions)
    mask = torch.full((1, 1, 6, 6), torch.finfo(dtype).min, dtype=dtype).triu(2)
    expected = reference.model.layers[1].self_attn(hidden, rotary, mask)[0]
    attention = bridge.blocks[1].attn
    assert same(attention(hidden, rotary, mask)[0], expected)
    assert same(attention(hidden, position_ids=positions, attention_mask=mask)[0], expected)


def test_no_bias_to_train_is_added() -> None:
    reference, bridge = models.pair()
    names = [name for name, _ in bridge.original_model.named_parameters()]
    assert len(names) == len(list(reference.parameters()))
    assert not any(name.endswith("bias") for name in names)


def test_the_same_cast_and_back() -> None:
    reference, bridge = models.pair(**SHAPES["gqa-clip-bias"])
    for dtype in (torch.bfloat16, torch.float32):
        assert same(bridge.to(dtype)(TOKENS), reference.to(dtype)(TOKENS).logits)


@pytest.mark.parametrize("shape", ["plain", "gqa-clip-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_full_decomposition_is_projected_in_every_dtype(dtype: Any, shape: Any) -> None:
    reference, bridge = models.pair(dtype=dtype, **SHAPES[shape])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS)
        direction = reference.lm_head.weight[3]
        stack = cache.get_full_resid_decomposition(project_output_onto=direction)
    assert stack.dtype == dtype
    assert cache.get_full_resid_decomposition().dtype == dtype
    residual = cache["resid_post", 1].double() @ direction.double()
    size = stack.double().abs().sum(0).max()
    assert (stack.double().sum(0) - residual).abs().max() < 4 * torch.finfo(dtype).eps * size
