"""Faults of OLMo's LayerNorm and of the hooks inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from adapter import normalization
from adapter.normalization import EPS, OlmoLayerNormBridge
from conformance.mutants.catalogue import Make, add, hook_mutant, mutant


def _rms(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).to(x.dtype)


def _unbiased(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    return (centered / (wide.var(-1, keepdim=True) + EPS).sqrt()).to(x.dtype)


def _by(norm: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    return lambda original: lambda self, x: norm(x)


def _shape(x: torch.Tensor) -> list[int]:
    return [x.shape[-1]]


for name, breaks, trigger, killer, norm in (
    (
        "eps",
        "eps is 1e-6",
        "any",
        "forward.logits",
        lambda x: F.layer_norm(x.float(), _shape(x), eps=1e-6).to(x.dtype),
    ),
    (
        "dtype",
        "normalized in the model's dtype instead of float32",
        "float64",
        "forward.logits",
        lambda x: F.layer_norm(x, _shape(x), eps=EPS),
    ),
    ("unbiased", "the variance is divided by n - 1", "any", "forward.logits", _unbiased),
    ("rms", "the mean is not subtracted", "any", "forward.logits", _rms),
):
    add(
        f"layernorm.{name}",
        breaks,
        trigger,
        killer,
        OlmoLayerNormBridge,
        "_native",
        _by(norm),
    )

add(
    "layernorm.final",
    "the last LayerNorm is left out",
    "any",
    "forward.logits",
    OlmoLayerNormBridge,
    "_native",
    lambda original: lambda self, x: x if self.name == "model.norm" else original(self, x),
)

add(
    "layernorm.shown_eps",
    "hook_scale is computed with an eps of 1e-6",
    "a small variance: off by some 4e-6 where it is 1, just above the allowance",
    "hooks.values",
    normalization,
    "EPS",
    lambda original: 1e-6,
)


add(
    "layernorm.scale_silent",
    "hook_scale never fires",
    "any",
    "layernorm.incl_bwd",
    normalization,
    "is_hooked",
    lambda original: lambda point: False,
)


@mutant(
    "layernorm.scale_edit_ignored",
    "an edit of hook_scale",
    "layernorm.edits",
    OlmoLayerNormBridge,
    "_apply_scale_hook",
)
def scale_edit_ignored(original: Any) -> Any:
    """An edit of hook_scale changes nothing."""

    def apply(self: Any, hidden: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
        original(self, hidden, native)
        return native

    return apply


@mutant(
    "layernorm.scale_edit_detached",
    "an edit of hook_scale",
    "layernorm.edits",
    OlmoLayerNormBridge,
    "_apply_scale_hook",
)
def scale_edit_detached(original: Any) -> Any:
    """An edit of hook_scale cuts the gradient."""

    def apply(self: Any, hidden: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = original(self, hidden, native)
        return output if torch.equal(output, native) else output.detach()

    return apply


def _in_place_ignored(fire: Any, x: torch.Tensor) -> torch.Tensor:
    """A hook that returns a tensor has its effect; one that changes its argument has none."""
    left: torch.Tensor = fire(x)
    return x if left._version else left


hook_mutant(
    "layernorm.in_place_ignored",
    "an edit of hook_normalized in place changes nothing",
    "an edit of hook_normalized in place",
    "layernorm.edits",
    "blocks.{i}.ln1.hook_normalized",
    _in_place_ignored,
)
