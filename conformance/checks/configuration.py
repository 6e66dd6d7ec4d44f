"""What the bridge's configuration says of the model."""

from __future__ import annotations

from collections.abc import Iterator

from conformance.checks.registry import Adapter, check
from conformance.compare import Gap
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import bridged
from conformance.taps import LAYER_NORM_EPS


@check(
    "configuration.truth",
    "cfg carries the model's clip_qkv, attention_dropout, rotary_base, d_head, n_key_value_heads, "
    "eps and tying.",
    cases,
    examples=0.2,
)
def truth(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Field by field, on the bridge and on the configuration each attention reads."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    model = case.model
    due = {
        "clip_qkv": model.clip_qkv,
        "attention_dropout": model.attention_dropout,
        "rotary_base": model.rope_theta,
        "d_head": model.d_head,
        "n_heads": model.num_attention_heads,
        "n_key_value_heads": model.num_key_value_heads,
        "n_layers": model.num_hidden_layers,
        "d_model": model.hidden_size,
        "d_mlp": model.intermediate_size,
        "d_vocab": model.vocab_size,
        "n_ctx": model.max_position_embeddings,
        "eps": LAYER_NORM_EPS,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    holders = {"cfg": subject.bridge.cfg}
    for block in range(model.num_hidden_layers):
        holders[f"blocks.{block}.attn.config"] = subject.bridge.blocks[block].attn.config
    for holder, config in holders.items():
        for name, value in due.items():
            got = getattr(config, name, "absent")
            # Without grouped heads transformer_lens has None for their number.
            if name == "n_key_value_heads" and got is None and value == model.num_attention_heads:
                continue
            if got != value:
                yield Gap(f"{holder}.{name}", "contract", f"{got!r}, the model has {value!r}")
