"""Faults of hooks where they are rarely used: what they add or return, and under what they run."""

from __future__ import annotations

from typing import Any

import torch

from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import mutant


@mutant("training.steering_frozen", "a frozen model", "training.frozen", OlmoHookPoint, "__call__")
def steering_frozen(original: Any) -> Any:
    """Where nothing before it is trained, what a hook adds gets no gradient."""

    def call(self: Any, x: torch.Tensor, *args: Any) -> Any:
        result = original(self, x, *args)
        return result if x.requires_grad else result.detach()

    return call
