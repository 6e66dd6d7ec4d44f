"""Tiny OLMo models, as a pristine reference and as a bridge around a second one."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import OlmoConfig, OlmoForCausalLM

from adapter import OlmoArchitectureAdapter

torch.set_num_threads(1)  # pytest -n auto brings the processes; spinning threads would stall them

ADAPTER: Any = OlmoArchitectureAdapter
TOKENS = torch.tensor([[5, 9, 3, 40, 7, 7], [11, 4, 30, 8, 21, 3]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
GAP = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Weights are wide and clips near their scale: otherwise no clip ever binds.
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa-clip-bias": {"num_key_value_heads": 2, "clip_qkv": 0.5, "attention_bias": True},
    "mqa-head_dim": {"num_key_value_heads": 1, "head_dim": 12},
    "some-biases": {"attention_bias": True, "no_bias": "qo"},
    "clip-zero": {"clip_qkv": 0.0},
    "tied": {"tie_word_embeddings": True},
}


def olmo(dtype: torch.dtype = torch.float32, no_bias: str = "", **fields: Any) -> Any:
    """Build the same model for the same arguments; ``no_bias`` names projections without bias."""
    defaults: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    model: Any = OlmoForCausalLM(OlmoConfig(**defaults | fields))
    model.eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases start as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    for layer in model.model.layers:
        for name in no_bias:
            getattr(layer.self_attn, f"{name}_proj").bias = None
    return model.to(dtype)


def bridged(model: OlmoForCausalLM) -> Any:
    """Build a bridge as the conformance kit does: nothing is registered."""
    dtype = next(model.parameters()).dtype
    cfg = build_bridge_config_from_hf(model.config, "OlmoForCausalLM", "tiny", dtype)
    adapter = ADAPTER(cfg)
    adapter.prepare_model(model)
    return TransformerBridge(model, adapter, None)


def pair(**fields: Any) -> Any:
    """Build a reference and a bridge with the same weights."""
    return olmo(**fields), bridged(olmo(**fields))


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Count the tokens that are there, as TransformerLens does."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree bit for bit, NaN with NaN."""
    equal = a.shape == b.shape and a.dtype == b.dtype
    return equal and bool(((a == b) | (a.isnan() & b.isnan())).all())


def backward(logits: Any) -> None:
    """Send a gradient that treats no two logits alike."""
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    (logits * weights.to(logits.dtype)).sum().backward()


def same_gradients(reference: Any, bridge: Any) -> bool:
    """Whether both models have the same parameters and all gradients agree bit for bit."""
    pairs = list(zip(reference.parameters(), bridge.original_model.parameters(), strict=True))
    return all(same(a.grad, b.grad) for a, b in pairs)


def observe_everything(bridge: TransformerBridge) -> None:
    """Put a forward and a backward hook that only look on every hook point."""
    for point in set(bridge.hook_dict.values()):
        point.add_hook(lambda tensor, hook: None)
        point.add_hook(lambda tensor, hook: None, dir="bwd")
