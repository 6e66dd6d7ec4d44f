"""The adapter as a whole: configuration, optional parameters, preparing, loading."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import adapter
from adapter.tests import models
from adapter.tests.models import SHAPES, TOKENS, same


def registry() -> Any:
    # Imported first, this module is circular in transformer_lens 4.0.
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    return ArchitectureAdapterFactory


def test_the_configuration_tells_the_truth() -> None:
    theta = {"rope_type": "default", "rope_theta": 500.0}
    fields: dict[str, Any] = {
        "head_dim": 12,
        "num_key_value_heads": 2,
        "clip_qkv": 0.5,
        "attention_dropout": 0.1,
    }
    bridge = models.bridged(models.olmo(rope_parameters=theta, **fields))
    for cfg in (bridge.cfg, bridge.adapter.cfg, bridge.blocks[1].attn.config):
        assert cfg.clip_qkv == 0.5
        assert cfg.attention_dropout == 0.1
        assert cfg.rotary_base == 500
        assert cfg.d_head == 12
        assert cfg.n_key_value_heads == 2
        assert cfg.eps == 1e-5
        assert cfg.tie_word_embeddings is False
    assert models.bridged(models.olmo(tie_word_embeddings=True)).cfg.tie_word_embeddings is True


def test_optional_parameters() -> None:
    assert len(adapter.OPTIONAL_PARAMETERS) == 7
    with_some = models.bridged(models.olmo(**SHAPES["some-biases"]))
    assert with_some.blocks[0].attn.b_Q is None
    assert with_some.blocks[0].attn.b_K.shape == (4, 8)
    assert with_some.b_K.shape == (2, 4, 8)
    assert "blocks.0.attn.k.bias" in with_some.state_dict()
    assert "blocks.0.attn.q.bias" not in with_some.state_dict()
    for name in ("b_Q", "b_O", "b_in", "b_out"):
        with pytest.raises(AttributeError, match=name):
            getattr(with_some, name)


@pytest.mark.parametrize("exact", [False, True], ids=["skip", "exact"])
def test_preparing_again_and_after_bridging_changes_nothing(exact: Any) -> None:
    reference, model = models.olmo(clip_qkv=0.5), models.olmo(clip_qkv=0.5)
    bridge = models.bridged(model)
    for target in (model, bridge):
        bridge.adapter.prepare_model(target, exact_clip=exact)
        assert same(bridge(TOKENS), reference(TOKENS).logits)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), object(), None])
def test_preparing_what_has_no_clip_is_a_no_op(thing: Any) -> None:
    models.bridged(models.olmo()).adapter.prepare_model(thing)


def test_preparing_a_clip_without_layers_is_an_error() -> None:
    strange: Any = torch.nn.Module()
    strange.config = models.olmo(clip_qkv=0.5).config
    with pytest.raises(AttributeError, match="layers"):
        models.bridged(models.olmo()).adapter.prepare_model(strange)


def test_bridge_registers_nothing_and_register_does() -> None:
    before = dict(registry()._adapters)
    bridge = adapter.bridge(models.olmo(clip_qkv=0.5))
    assert same(bridge(TOKENS), models.olmo(clip_qkv=0.5)(TOKENS).logits)
    assert registry()._adapters == before
    try:
        adapter.register()
        chosen = registry().select_architecture_adapter(bridge.cfg)
        assert type(chosen) is adapter.OlmoArchitectureAdapter
    finally:
        registry()._adapters.update(before)


def test_a_bridged_model_is_not_bridged_again() -> None:
    model = models.olmo(clip_qkv=0.5)
    bridge = adapter.bridge(model)
    with pytest.raises(ValueError, match="is inside of a bridge already"):
        adapter.bridge(model)
    assert same(bridge(TOKENS), models.olmo(clip_qkv=0.5)(TOKENS).logits)


def test_importing_is_light() -> None:
    code = "import sys, adapter; assert not {'torch', 'transformer_lens'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        adapter.nonsense  # noqa: B018
    assert set(adapter.__all__) <= set(dir(adapter))


def test_another_architecture_keeps_its_components() -> None:
    models.bridged(models.olmo())
    upstream = registry()._adapters["OlmoForCausalLM"]
    assert upstream.__module__.startswith("transformer_lens")


def test_any_name_can_be_the_first() -> None:
    code = """
import sys, transformer_lens.model_bridge
for first in ("bridge", "OlmoArchitectureAdapter", "patch_clip"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "adapter"]:
        del sys.modules[name]
    exec(f"from adapter import {first}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
