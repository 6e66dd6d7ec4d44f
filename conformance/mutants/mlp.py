"""Faults of the gated MLP, and of the loss."""

from __future__ import annotations

from typing import Any

import torch

from adapter.compatibility import OlmoTransformerBridge
from adapter.mlp import OlmoMLPBridge
from adapter.olmo import OlmoArchitectureAdapter
from conformance.mutants.catalogue import add, bridge_mutant, mutant


@bridge_mutant("mlp.always_silu", "another activation", "forward.logits")
def always_silu(bridge: Any) -> None:
    """The activation is SiLU, whatever hidden_act says."""
    for block in bridge.blocks:
        block.mlp.original_component.act_fn = torch.nn.SiLU()


@mutant("mlp.exchanged", "any", "hooks.values", OlmoArchitectureAdapter, "__init__")
def exchanged(original: Any) -> Any:
    """The bridges of gate_proj and up_proj are exchanged: hook_pre shows what is not activated."""

    def init(self: Any, cfg: Any) -> None:
        original(self, cfg)
        parts = self.component_mapping["blocks"].submodules["mlp"].submodules
        parts["gate"].name, parts["in"].name = parts["in"].name, parts["gate"].name

    return init


add(
    "mlp.fires_twice",
    "hook_out of the MLP fires twice, and an additive edit counts twice",
    "any",
    "hooks.values",
    OlmoMLPBridge,
    "forward",
    lambda original: lambda self, *args, **named: self.hook_out(original(self, *args, **named)),
)


add(
    "loss.scaled",
    "the loss is too large by 1e-5 of itself, just above the allowance",
    "float32 or float64",
    "forward.loss",
    OlmoTransformerBridge,
    "loss_fn",
    lambda original: lambda *args, **named: original(*args, **named) * (1 + 1e-5),
)
add(
    "loss.mask_ignored",
    "the loss counts pads",
    "padding",
    "forward.loss",
    OlmoTransformerBridge,
    "loss_fn",
    lambda original: lambda self, logits, tokens, *mask, **named: original(self, logits, tokens),
)
