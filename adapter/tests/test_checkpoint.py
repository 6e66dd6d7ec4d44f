"""A directory that is no whole OLMo is refused before it is loaded, in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import OlmoForCausalLM

import adapter
from adapter.checkpoint import CheckpointError, require_whole
from adapter.configuration import configurations
from adapter.tests import models
from adapter.tests.models import TOKENS, same
from adapter.tests.test_adapter import registry
from adapter.tests.test_text import tokenizer


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(registry()._adapters)
    adapter.register()
    yield
    registry()._adapters.update(before)


def saved(path: Any, *, size: Any = "1GB", **fields: Any) -> Any:
    """A model on disk, and its configuration as it is loaded again."""
    model = models.olmo(**fields)
    model.save_pretrained(path, max_shard_size=size)
    return model.config


def broken(path: Any, config: Any, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_whole(path, config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("size", ["1GB", 2000], ids=["one file", "shards"])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_a_whole_one_passes(tmp_path: Any, size: Any, fields: Any) -> None:
    require_whole(tmp_path, saved(tmp_path, size=size, **fields))


def test_one_saved_below_the_head_lacks_the_head(tmp_path: Any) -> None:
    model = models.olmo()
    model.model.save_pretrained(tmp_path)
    broken(tmp_path, model.config, "lm_head.weight")
    tied = models.olmo(tie_word_embeddings=True)
    tied.model.save_pretrained(tmp_path)
    require_whole(tmp_path, tied.config)


def test_a_tied_one_may_be_saved_under_the_name_of_its_head(tmp_path: Any) -> None:
    model = models.olmo(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    require_whole(tmp_path, model.config)
    loaded = OlmoForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert same(loaded(TOKENS).logits, model(TOKENS).logits)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    broken(tmp_path, model.config, "model.embed_tokens.weight")


def test_the_shapes_of_quantized_tensors_are_left_to_hugging_face(tmp_path: Any) -> None:
    config = saved(tmp_path)
    config.intermediate_size = 44
    broken(tmp_path, config, "gate_proj.weight")
    config.quantization_config = {"quant_method": "bitnet"}
    require_whole(tmp_path, config)


def test_what_is_left_to_hugging_face(tmp_path: Any) -> None:
    require_whole(tmp_path, models.olmo().config)  # no safetensors: perhaps it is a .bin


@pytest.mark.parametrize("content", [b"", b"\x05", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 50])
def test_a_file_that_is_none(tmp_path: Any, content: bytes) -> None:
    config = saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    broken(tmp_path, config, "model.safetensors: damaged")


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0"], ids=["short", "long"])
def test_a_file_of_another_length(tmp_path: Any, change: Any) -> None:
    config = saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    broken(tmp_path, config, "model.safetensors: damaged", "bytes")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path: Any, index: str) -> None:
    config = saved(tmp_path, size=2000)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    broken(tmp_path, config, "model.safetensors.index.json")


def test_an_index_that_leaves_a_tensor_out(tmp_path: Any) -> None:
    config = saved(tmp_path, size=2000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        del index["weight_map"][name]
    path.write_text(json.dumps(index))
    broken(tmp_path, config, "model.layers.1.mlp.up_proj.weight and 1 other")


def test_a_configuration_that_asks_for_more(tmp_path: Any) -> None:
    config = saved(tmp_path)
    config.attention_bias = True
    broken(tmp_path, config, "self_attn.q_proj.bias and 7 others")
    config.attention_bias, config.intermediate_size = False, 44
    broken(tmp_path, config, "mlp.gate_proj.weight", "[40, 32]", "[44, 32]")


def test_another_model_of_that_name(tmp_path: Any) -> None:
    config = saved(tmp_path)
    config.model_type = "llama"
    broken(tmp_path, config, "config.json", "llama")


def test_a_tokenizer_that_is_none(tmp_path: Any) -> None:
    config = saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    broken(tmp_path, config, "tokenizer.json")


@pytest.mark.usefixtures("registered")
def test_nothing_random_is_booted(tmp_path: Any) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight"):
        TransformerBridge.boot_transformers(str(tmp_path), device="cpu")


@pytest.mark.usefixtures("registered")
def test_no_tokenizer_is_made_up(tmp_path: Any) -> None:
    config = saved(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    # Nor is the directory needed for what is loaded already.
    bridge = adapter.bridge(models.olmo())
    assert bridge.tokenizer is None
    assert same(bridge(TOKENS), models.olmo()(TOKENS).logits)
    assert config.model_type == "olmo"


def test_looking_changes_neither_configuration_nor_random_state(tmp_path: Any) -> None:
    config = saved(tmp_path)
    before, state = config.to_dict(), torch.get_rng_state()
    require_whole(tmp_path, config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("registered")
def test_a_model_that_is_given_says_its_dtype(tmp_path: Any) -> None:
    saved(tmp_path)
    model = OlmoForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=model, tokenizer=tokenizer(), device="cpu"
    )
    assert {config.dtype for config in configurations(bridge)} == {torch.bfloat16}
