"""The bridge's configuration says what the wrapped model really is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from adapter.normalization import EPS


def tell_the_truth(bridge: TransformerBridge) -> None:
    """Copy what TransformerLens' translation leaves out or gets wrong for OLMo.

    Every block has a configuration of its own, copied from the bridge's; all of them are set.
    """
    model: Any = bridge.original_model
    hf = model.config
    theta = hf.rope_parameters["rope_theta"]
    facts = {
        "clip_qkv": hf.clip_qkv,
        "attention_dropout": hf.attention_dropout,
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "d_head": getattr(hf, "head_dim", hf.hidden_size // hf.num_attention_heads),
        "n_key_value_heads": hf.num_key_value_heads,
        "eps": EPS,
        "dtype": model.lm_head.weight.dtype,  # that of a model given to boot_transformers, too
        "tie_word_embeddings": model.lm_head.weight is model.model.embed_tokens.weight,
    }
    for config in configurations(bridge):
        vars(config).update(facts)


def configurations(bridge: TransformerBridge) -> Iterator[TransformerBridgeConfig]:
    """The bridge's configuration and those of its components."""
    for owner in (bridge, *bridge.modules()):
        config = owner.cfg if owner is bridge else getattr(owner, "config", None)
        if isinstance(config, TransformerBridgeConfig):
            yield config
