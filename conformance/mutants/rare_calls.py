"""Faults of what is seldom called, or seldom called so: in compatibility mode, by another name."""

from __future__ import annotations

from typing import Any

import torch

from adapter.attention import OlmoAttentionBridge
from adapter.clip import _PatchedForward
from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import mutant


@mutant(
    "processed.starts_late",
    "compatibility mode, two blocks",
    "processing.forward",
    OlmoTransformerBridge,
    "forward",
)
def starts_late(original: Any) -> Any:
    """In compatibility mode start_at_layer starts one block late."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = kwargs.get("start_at_layer")
        last = len(self.blocks) - 1
        if start is not None and self.compatibility_mode and start not in (-1, last):
            kwargs["start_at_layer"] = start + 1
        return original(self, *args, **kwargs)

    return forward


@mutant(
    "processed.autocast",
    "compatibility mode under autocast",
    "processing.forward",
    OlmoAttentionBridge,
    "_pattern_of",
)
def uniform_under_autocast(original: Any) -> Any:
    """In compatibility mode under autocast a query attends alike to all that it sees."""

    def pattern_of(self: Any, scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        pattern: torch.Tensor = original(self, scores, dtype)
        if not (self.compatibility_mode and torch.is_autocast_enabled("cpu")):
            return pattern
        seen = (pattern > 0).to(pattern.dtype)
        return seen / seen.sum(-1, keepdim=True)

    return pattern_of


@mutant("patch.saved_skips", "an exact patch", "patched.modes", _PatchedForward, "__reduce_ex__")
def saved_skips(original: Any) -> Any:
    """An exactly patched model that torch.save has written comes back without its clamp."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        how, given, state, *rest = original(self, protocol)
        if protocol < 4 and self.mode == "exact":
            state = {**state, "mode": "skip"}
        return how, given, state, *rest

    return reduce_ex


@mutant(
    "weights.stacked_by_version",
    "an assignment to .data",
    "weights.live",
    OlmoTransformerBridge,
    "_stack_block_params",
)
def stacked_by_version(original: Any) -> Any:
    """Stacked weights are kept for as long as no parameter's version changes."""

    def stack(self: Any, *args: Any, **kwargs: Any) -> Any:
        versions = [tensor._version for tensor in self.original_model.parameters()]
        asked = repr((args, kwargs, versions, torch.is_grad_enabled()))
        kept = vars(self).setdefault("_stacks", {})
        if asked not in kept:
            kept[asked] = original(self, *args, **kwargs)
        return kept[asked]

    return stack


@mutant(
    "sampling.repeated",
    "several sequences of one prompt",
    "sampling.hugging_face",
    OlmoTransformerBridge,
    "hf_generate",
)
def repeated(original: Any) -> Any:
    """Of several samples that hf_generate is asked for it gives the first, again and again."""

    def hf_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, several = original(self, *args, **kwargs), kwargs.get("num_return_sequences", 1)
        if isinstance(result, torch.Tensor) and "num_beams" not in kwargs:
            result = result[::several].repeat_interleave(several, dim=0)
        return result

    return hf_generate
