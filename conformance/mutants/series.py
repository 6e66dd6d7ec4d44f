"""Faults that the first run of a bridge does not show: what is kept, and stale in the next."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from adapter.attention import OlmoAttentionBridge
from adapter.mlp import BranchLinearBridge
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import mutant


@mutant(
    "series.stale_rotation",
    "two runs of one shape with other positions",
    "series.everything",
    OlmoAttentionBridge,
    "_rotation",
)
def stale_rotation(original: Any) -> Any:
    """The cosines and sines of the first run of a shape serve all later ones."""

    def rotation(self: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        found = original(self, hidden, kwargs)
        return vars(self).setdefault("_kept", {}).setdefault(found[0].shape, found)

    return rotation


@mutant(
    "series.stale_weights",
    "a run with other weights",
    "series.everything",
    BranchLinearBridge,
    "forward",
)
def stale_weights(original: Any) -> Any:
    """The up projection computes with the weights of its first run; their gradients are right."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **named: Any) -> Any:
        if self.name != "up_proj":
            return original(self, x, *args, **named)
        weight = self.original_component.weight
        kept = vars(self).setdefault("_kept", weight.detach().clone())
        used = with_gradient_of(kept.to(weight.dtype), weight)
        return self.hook_out(F.linear(self.hook_in(x), used))

    return forward


@mutant(
    "series.dropout_stays",
    "dropout, a run in train mode and a later one in eval mode",
    "series.everything",
    OlmoAttentionBridge,
    "forward",
)
def dropout_stays(original: Any) -> Any:
    """An attention that was once in train mode drops out for ever."""

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        mode = self.training
        self.training = vars(self).setdefault("_trained", False) or mode
        vars(self)["_trained"] = self.training
        try:
            return original(self, *args, **named)
        finally:
            self.training = mode

    return forward


@mutant(
    "series.tenth_run",
    "ten forwards",
    "series.everything",
    OlmoAttentionBridge,
    "_clip",
)
def tenth_run(original: Any) -> Any:
    """From the tenth forward on, the values' gradients are too large by 1e-3."""

    def clip(self: Any, *projections: torch.Tensor) -> Any:
        vars(self)["_runs"] = vars(self).get("_runs", 0) + 1
        query, key, value = original(self, *projections)
        if self._runs >= 10:
            value = with_gradient_of(value, value * 1.001)
        return query, key, value

    return clip
