"""State dicts under either side's names, refusals that change nothing, casts, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapter.tests import models
from adapter.tests.models import SHAPES, TOKENS, same

STEPS = ["fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"]


def shifted(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_faces_own_state_dict_is_taken(shape: Any, assign: Any) -> None:
    reference, bridge = shifted(models.olmo(**SHAPES[shape])), models.pair(**SHAPES[shape])[1]
    result = bridge.load_state_dict(reference.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(bridge(TOKENS), reference(TOKENS).logits)
    tied = bridge.unembed.weight is bridge.embed.weight
    assert tied == reference.config.tie_word_embeddings


def test_the_unembeddings_zero_bias_need_not_be_there() -> None:
    bridge = models.bridged(models.olmo())
    state = {k: v.clone() for k, v in bridge.state_dict().items() if k != "unembed.bias"}
    assert not bridge.load_state_dict(state).missing_keys
    assert not bridge.b_U.any()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "key", ["blocks.1.attn.q.weight", "model.layers.1.self_attn.q_proj.weight"]
)
def test_a_wrong_shape_changes_nothing(key: Any, strict: Any) -> None:
    reference, bridge = models.pair()
    state = {name: tensor + 1 for name, tensor in bridge.state_dict().items()}
    del state["blocks.1.attn.q.weight"]
    state[key] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn\.q\.weight: \[3, 3\]"):
        bridge.load_state_dict(state, strict=strict)
    assert same(bridge(TOKENS), reference(TOKENS).logits)


def test_an_unknown_key_keeps_its_name_in_the_error() -> None:
    bridge = models.bridged(models.olmo())
    state = {**bridge.state_dict(), "model.layers.7.self_attn.q_proj.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"model\.layers\.7\.self_attn"):
        bridge.load_state_dict(state)


@pytest.mark.parametrize("way", ["half", "double", "bfloat16"])
def test_every_cast_is_told(way: Any) -> None:
    reference, bridge = models.pair()
    assert getattr(bridge, way)() is bridge
    logits = bridge(TOKENS)
    assert same(logits, getattr(reference, way)()(TOKENS).logits)
    assert bridge.cfg.dtype == bridge.blocks[1].attn.config.dtype == logits.dtype
    bridge.to(torch.float32)
    assert bridge.cfg.dtype == bridge.blocks[1].attn.config.dtype == torch.float32


def test_a_cast_of_the_parameters_alone_is_followed() -> None:
    for model in (reference := models.olmo(), (bridge := models.bridged(models.olmo()))):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    assert same(bridge(TOKENS), reference(TOKENS).logits)


def thirds(**fields: Any) -> Any:
    """A float64 model whose weights are no float32 numbers."""
    model = models.olmo(dtype=torch.float64, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(3)
    return model


def test_float64_weights_that_nothing_was_asked_of_stay() -> None:
    reference, bridge = thirds(), models.bridged(thirds())
    bridge.enable_compatibility_mode(disable_warnings=True, **dict.fromkeys(STEPS, False))
    assert same(bridge.W_E, reference.model.embed_tokens.weight)
    assert same(bridge.blocks[1].mlp.W_out, reference.model.layers[1].mlp.down_proj.weight.T)


def test_float64_weights_are_processed_in_float64() -> None:
    bridge = models.bridged(thirds(attention_bias=True))
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert bridge.W_E.mean(-1).abs().max() < 1e-16
    assert bridge.W_O.mean(-1).abs().max() < 1e-16
    assert bridge.b_O.dtype == torch.float64
    assert bridge.b_O.mean(-1).abs().max() < 1e-16
    assert not bridge.b_V.any()
