"""One small OLMo whose clip binds, and what the tests of the clip patch compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.model_bridge.supported_architectures.olmo import (
    OlmoArchitectureAdapter as UpstreamAdapter,
)
from transformers import OlmoConfig, OlmoForCausalLM

CLIP = 0.25  # exact in every dtype
TOKENS = torch.tensor([[1, 5, 9, 2, 7, 7], [3, 8, 0, 4, 4, 6]])
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["default", "exact"])

Results = dict[str, torch.Tensor]


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
    """A layer's attention."""
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
    """The same results, bit for bit."""
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
    """Upstream's own bridge around a model."""
    config = build_bridge_config_from_hf(model.config, "OlmoForCausalLM", "olmo", torch.float32)
    config.device = "cpu"
    return TransformerBridge(model, UpstreamAdapter(config), None)


def standalone_warnings(action: Callable[[], object]) -> list[str]:
    """What an action warns of a clamp that is skipped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "clip_qkv" in str(w.message)]
