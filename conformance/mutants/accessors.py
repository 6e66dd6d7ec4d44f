"""Faults of weight accessors, of what is made of them, of parameters and casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.mlp import OlmoMLPBridge
from adapter.unembedding import OlmoUnembeddingBridge
from conformance.mutants.catalogue import Make, add, mutant


def _read(change: Any) -> Make:
    """A property that gives ``change`` of what it gave."""

    def make(original: Any) -> Any:
        def get(self: Any) -> Any:
            found = original.fget(self)
            return found if found is None else change(self, found)

        return property(get)

    return make


def _when_square(self: Any, weight: torch.Tensor) -> torch.Tensor:
    heads, d_head, width = weight.shape
    if heads * d_head != width:
        return weight
    return weight.flatten(0, 1).T.reshape(heads, d_head, width)


for name, breaks, trigger, killer, owner, attribute, change in (
    (
        "weights.square",
        "a square W_O comes out transposed",
        "n_heads * d_head == d_model",
        "weights.accessors",
        OlmoAttentionBridge,
        "W_O",
        _when_square,
    ),
    (
        "weights.heads_reversed",
        "the key heads are in the reverse order, on layers but the first",
        "two layers and two key heads",
        "weights.accessors",
        OlmoAttentionBridge,
        "W_K",
        lambda self, weight: weight.flip(0) if self._layer_idx else weight,
    ),
    (
        "weights.wide_bias",
        "the unembedding's zero bias is float32 whatever the model",
        "another dtype",
        "weights.accessors",
        OlmoUnembeddingBridge,
        "b_U",
        lambda self, bias: bias.float(),
    ),
    (
        "weights.copied",
        "W_out of a component is a copy, to which writing has no effect",
        "any",
        "weights.live",
        OlmoMLPBridge,
        "W_out",
        lambda self, weight: weight.clone(),
    ),
    (
        "weights.detached",
        "no gradient goes through W_gate",
        "any",
        "weights.live",
        OlmoMLPBridge,
        "W_gate",
        lambda self, weight: weight.detach(),
    ),
):
    add(name, breaks, trigger, killer, owner, attribute, _read(change))


@mutant(
    "weights.bias_forgotten",
    "a bias of o",
    "weights.accessors",
    OlmoTransformerBridge,
    "accumulated_bias",
)
def bias_forgotten(original: Any) -> Any:
    """The accumulated bias stops before attention, though the MLP's input was asked for."""
    return lambda self, layer, mlp_input=False, **named: original(self, layer, **named)


add(
    "circuits.tiled",
    "the OV and QK circuits pair query heads with key-value heads 0, 1, 0, 1 instead of 0, 0, 1, 1",
    "1 < n_kv < n_heads",
    "circuits.products",
    OlmoTransformerBridge,
    "_expand_kv_heads",
    lambda original: lambda self, w: w.repeat(1, self.cfg.n_heads // w.shape[1], 1, 1),
)


@mutant(
    "circuits.keys_as_queries",
    "any",
    "circuits.composition",
    OlmoTransformerBridge,
    "all_composition_scores",
)
def keys_as_queries(original: Any) -> Any:
    """K-composition is computed as Q-composition."""
    return lambda self, mode: original(self, "Q" if mode == "K" else mode)


@mutant(
    "circuits.same_layer",
    "any",
    "circuits.composition",
    OlmoTransformerBridge,
    "all_composition_scores",
)
def same_layer(original: Any) -> Any:
    """The first head of a layer has a score with itself."""

    def scores(self: Any, mode: str) -> Any:
        found = original(self, mode)
        found.scores = found.scores.clone()
        found.scores[0, 0, 0, 0] = 1e-4
        return found

    return scores


@mutant(
    "parameters.bias_trained",
    "any",
    "parameters.same",
    OlmoUnembeddingBridge,
    "set_original_component",
)
def bias_trained(original: Any) -> Any:
    """The unembedding's zero bias is a parameter."""

    def bind(self: Any, component: Any) -> None:
        original(self, component)
        zeros = component.bias
        del component.bias
        component.bias = nn.Parameter(zeros)

    return bind


@mutant("parameters.order", "any", "parameters.same", OlmoTransformerBridge, "named_parameters")
def order(original: Any) -> Any:
    """Named_parameters begins with the unembedding: an optimizer's state then fits no other."""

    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        return iter(list(original(self, *args, **kwargs))[::-1])

    return named


add(
    "parameters.dtype_untold",
    "configurations keep the dtype of before a cast",
    "any",
    "parameters.cast",
    OlmoTransformerBridge,
    "_tell_dtype",
    lambda original: lambda self: None,
)


@mutant("parameters.cast_short", "a cast", "parameters.cast", OlmoTransformerBridge, "to")
def cast_short(original: Any) -> Any:
    """A cast goes by way of bfloat16."""

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        original(self, torch.bfloat16)
        return original(self, *args, **kwargs)

    return to
