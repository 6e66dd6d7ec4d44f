"""Compatibility mode never changes log-probabilities, and says what it does not do."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers.activations import ACT2FN

from adapter.tests import models
from adapter.tests.models import TOKENS, same

SHAPES = {
    **models.SHAPES,
    "gqa-bias": {"num_key_value_heads": 2, "attention_bias": True},
    "mqa-some-biases": {"num_key_value_heads": 1, "attention_bias": True, "no_bias": "qo"},
    "square-mlp": {"intermediate_size": 32},
    "square-unembedding": {"vocab_size": 64, "hidden_size": 64},
}
STEPS = ["fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"]


def gap(reference: Any, bridge: Any) -> Any:
    with torch.no_grad():
        expected = reference(TOKENS).logits.float().log_softmax(-1)
        return (bridge(TOKENS).float().log_softmax(-1) - expected).abs().max().item()


@pytest.mark.filterwarnings("ignore:value biases are not folded")
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_stay(shape: Any) -> None:
    for wanted in (STEPS, *([step] for step in STEPS)):
        reference, bridge = models.pair(**SHAPES[shape])
        steps = {step: step in wanted for step in STEPS}
        bridge.enable_compatibility_mode(disable_warnings=True, **steps)
        assert gap(reference, bridge) < 5e-5, wanted


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_every_activation_stays_itself(activation: Any) -> None:
    reference, bridge = models.pair(hidden_act=activation)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert gap(reference, bridge) < 5e-5


@pytest.mark.parametrize("shape", ["gqa-bias", "mqa-some-biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_biases_are_folded_where_that_is_legal(dtype: Any, shape: Any) -> None:
    _, bridge = models.pair(dtype=dtype, **SHAPES[shape])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge.enable_compatibility_mode(disable_warnings=True)
    for block in bridge.blocks:
        assert not block.attn.b_V.any()
        assert block.attn.b_O.any()
        assert block.attn.b_O.dtype == dtype
    assert bridge(TOKENS).dtype == dtype


def test_value_biases_stay_before_a_clamp() -> None:
    reference, bridge = models.pair(**SHAPES["gqa-clip-bias"])
    with pytest.warns(UserWarning, match=r"clip_qkv=0\.5"):
        bridge.enable_compatibility_mode(disable_warnings=True)
    expected = reference.model.layers[0].self_attn.v_proj.bias
    assert same(bridge.blocks[0].attn.b_V.flatten(), expected)


def test_a_subclass_of_transformer_lens_bridge_is_ours_too() -> None:
    class Mine(TransformerBridge):
        def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
            return TOKENS

    model = models.olmo(**SHAPES["gqa-clip-bias"])
    bridge: Any = Mine(model, models.bridged(models.olmo(**SHAPES["gqa-clip-bias"])).adapter, None)
    assert isinstance(bridge, Mine)
    assert same(bridge.to_tokens("any"), TOKENS)
    with pytest.warns(UserWarning, match=r"clip_qkv=0\.5"):
        bridge.enable_compatibility_mode(disable_warnings=True)
    assert type(bridge) is type(copy.deepcopy(bridge))


def test_value_biases_stay_while_dropout_is_active() -> None:
    _, bridge = models.pair(attention_bias=True, attention_dropout=0.1)
    bridge.train()
    with pytest.warns(UserWarning, match="attention_dropout"):
        bridge.process_weights()
    assert bridge.blocks[0].attn.b_V.any()


@pytest.mark.parametrize("way", ["enable_compatibility_mode", "process_weights"])
def test_a_refusal_changes_nothing(way: Any) -> None:
    reference, bridge = models.pair(**SHAPES["gqa-bias"])
    names, weights = list(bridge.hook_dict), {k: v.clone() for k, v in bridge.state_dict().items()}
    with pytest.raises(ValueError, match="rotary"):
        getattr(bridge, way)(refactor_factored_attn_matrices=True)
    assert list(bridge.hook_dict) == names
    assert not bridge.compatibility_mode
    assert all(same(weights[name], value) for name, value in bridge.state_dict().items())
    assert same(bridge(TOKENS), reference(TOKENS).logits)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert not bridge.blocks[0].attn.b_V.any()
    assert gap(reference, bridge) < 5e-5


def test_all_processed_weights_train() -> None:
    _, bridge = models.pair()
    bridge.enable_compatibility_mode(disable_warnings=True)
    models.backward(bridge(TOKENS))
    assert all(p.grad is not None and p.grad.any() for p in bridge.parameters())


def test_what_is_frozen_stays_frozen() -> None:
    _, bridge = models.pair(attention_bias=True, no_bias="o", tie_word_embeddings=True)
    frozen = {name for name, held in list(bridge.named_parameters())[::2] if held.ndim == 2}
    for name, held in bridge.named_parameters():
        held.requires_grad_(name not in frozen)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert frozen
    assert {name for name, held in bridge.named_parameters() if not held.requires_grad} == frozen


def test_nothing_new_trains_in_a_frozen_model() -> None:
    _, bridge = models.pair(attention_bias=True, no_bias="o", tie_word_embeddings=True)
    bridge.requires_grad_(False)
    before = len(list(bridge.parameters()))
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert len(list(bridge.parameters())) > before
    assert not any(held.requires_grad for held in bridge.parameters())


def test_padded_queries_have_no_pattern_and_no_nan() -> None:
    _, bridge = models.pair(attention_bias=True)
    bridge.enable_compatibility_mode(disable_warnings=True)
    logits, cache = bridge.run_with_cache(TOKENS, attention_mask=models.LEFT)
    models.backward(logits * models.LEFT[..., None])
    assert not cache["blocks.0.attn.hook_pattern"][0, :, :2].any()
    assert not any(p.grad.isnan().any() for p in bridge.parameters())


def test_processing_unties_and_says_so() -> None:
    _, bridge = models.pair(tie_word_embeddings=True)
    assert bridge.cfg.tie_word_embeddings
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert not bridge.cfg.tie_word_embeddings
