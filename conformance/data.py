"""The fixture data: inside the wheel beside this file, in a checkout beside the package."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from conformance.records import Record, load
from conformance.spec import ModelSpec

_HERE = Path(__file__).parent
FIXTURES = _HERE / "fixtures" if (_HERE / "fixtures").is_dir() else _HERE.parent / "fixtures"
TRAINED = FIXTURES / "trained"


@cache
def _records() -> tuple[Record, ...]:
    return tuple(load(path) for path in sorted((FIXTURES / "regressions").glob("*.json")))


def regressions(check: str) -> list[Record]:
    """The recorded cases of a check that once failed: replayed before any is drawn."""
    return [record for record in _records() if record.check == check]


def published() -> dict[str, ModelSpec]:
    """The published OLMo v1 configurations, by checkpoint, cut down to what a test can hold.

    Hidden size, head geometry, MLP width, positions, clip and tying are the published ones. One
    layer stands for all, the vocabulary is smaller, and the weights are drawn.
    """
    specs = {}
    for path in sorted((FIXTURES / "published").glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        specs[path.stem] = ModelSpec(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=1,
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            vocab_size=128,
            max_position_embeddings=config["max_position_embeddings"],
            hidden_act=config["hidden_act"],
            rope_theta=config["rope_theta"],
            tie_word_embeddings=config["tie_word_embeddings"],
            pad_token_id=config["pad_token_id"],
            clip_qkv=config["clip_qkv"],
            # A clip of 8 at hidden size 4096 binds on a fifth of the entries at this scale.
            weight_scale=0.1,
        )
    return specs


def trained(dtype: str = "float32") -> ModelSpec:
    """The model of `TRAINED`, a small OLMo that has learned real text.

    Args:
        dtype: What its weights, saved in float32, are cast to.
    """
    config = json.loads((TRAINED / "config.json").read_text(encoding="utf-8"))
    return ModelSpec(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        hidden_act=config["hidden_act"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        tie_word_embeddings=config["tie_word_embeddings"],
        pad_token_id=config["pad_token_id"],
        clip_qkv=config["clip_qkv"],
        dtype=dtype,
        weights="trained",
    )


@cache
def held_out() -> str:
    """The text that the trained model has not seen."""
    return (TRAINED / "held_out.txt").read_text(encoding="utf-8")


@cache
def held_out_tokens() -> tuple[int, ...]:
    """That text in the trained model's tokens, with nothing added."""
    from tokenizers import Tokenizer  # here, so that looking for a fixture stays light

    tokenizer = Tokenizer.from_file(str(TRAINED / "tokenizer.json"))
    return tuple(tokenizer.encode(held_out(), add_special_tokens=False).ids)
