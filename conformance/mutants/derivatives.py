"""Faults that no first derivative shows, or only one of a transform."""

from __future__ import annotations

from typing import Any

import torch

from adapter import attention
from adapter.attention import OlmoAttentionBridge
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import mutant


class _OnceOnly(torch.autograd.Function):
    """The identity, whose gradient has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.detach()


@mutant(
    "derivatives.clamp_once",
    "a second derivative",
    "derivatives.second",
    OlmoAttentionBridge,
    "_clip",
)
def clamp_once(original: Any) -> Any:
    """The gradient through the clamp of keys has no gradient."""

    def clamp(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        once: torch.Tensor = _OnceOnly.apply(k)  # type: ignore[no-untyped-call]
        return original(self, q, once, v)

    return clamp


@mutant(
    "derivatives.vmap_unclipped",
    "vmap and a clip that binds",
    "derivatives.transformed",
    OlmoAttentionBridge,
    "_clip",
)
def vmap_unclipped(original: Any) -> Any:
    """Inside of vmap values are not clamped."""

    def clamp(self: Any, *projections: torch.Tensor) -> Any:
        clamped = original(self, *projections)
        if torch._C._functorch.is_batchedtensor(projections[2]):
            return (*clamped[:2], projections[2])
        return clamped

    return clamp


@mutant("derivatives.rotation", "any", "derivatives.quotients", attention, "apply_rotary_pos_emb")
def rotation(original: Any) -> Any:
    """The gradient of a rotated key is turned the same way as the key, and not back."""

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any) -> Any:
        rotated, key = original(q, k, cos, sin)
        return rotated, with_gradient_of(key, original(k, k, cos, -sin)[1])

    return rotate


@mutant(
    "derivatives.leaking_clamp",
    "a clip that binds",
    "derivatives.quotients",
    OlmoAttentionBridge,
    "_clip",
)
def leaking_clamp(original: Any) -> Any:
    """A thousandth of the gradient passes where queries are clamped."""

    def clamp(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        clamped, *others = original(self, q, k, v)
        return (with_gradient_of(clamped, 0.999 * clamped + 0.001 * q), *others)

    return clamp
