"""Faults that a review of the adapter has found: of runs within runs, and of what is around one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from adapter import block, forks, hooks
from adapter.calls import OlmoCalls
from adapter.text import OlmoTextBridge
from conformance.mutants.catalogue import mutant


@mutant(
    "alive.unedited_states",
    "an edit after a block",
    "alive.hidden_states",
    block,
    "record_hidden_state",
)
def _(_original: Any) -> Any:
    """output_hidden_states tells what the block gave before its hooks."""
    return lambda output: None


@mutant("nested.cached_all", "a run in a hook", "hook_api.nested", hooks._OnRoute, "__init__")
def _(original: Any) -> Any:
    """What caches a run caches those of its hooks, too."""

    def begin(self: Any, *args: Any) -> None:
        original(self, *args)
        self._caches = False

    return begin


@mutant("nested.part_cached", "a part in a hook", "hook_api.nested", hooks, "call_of_its_own")
def _(_original: Any) -> Any:
    """A part of the model that a hook calls is taken for a part of the hook's run."""
    return nullcontext


@mutant(
    "generation.cache_taken",
    "a hook that generates",
    "generation.hooks",
    OlmoCalls,
    "generate",
)
def _(_original: Any) -> Any:
    """A generation that ends takes the cache away from the one around it."""
    return lambda self, *args, **kwargs: OlmoTextBridge.generate(self, *args, **kwargs)


@mutant("text.cut_behind", "a text too long", "text.tokens", OlmoTextBridge, "_encode")
def _(original: Any) -> Any:
    """A text that is too long loses its end, whatever the tokenizer says."""

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "right"
        try:
            return original(self, *args, **kwargs)
        finally:
            self.tokenizer.truncation_side = side

    return encode


@mutant(
    "flags.kind_of_linear",
    "an edit by heads, and a linear map that computes more",
    "flags.refused",
    forks,
    "parameters_of",
)
def _(original: Any) -> Any:
    """Whatever is a Linear is taken for nothing but its weight."""

    def parameters_of(projection: Any) -> Any:
        if isinstance(projection, torch.nn.Linear) and not projection.weight.is_meta:
            return projection.weight, projection.bias
        return original(projection)

    return parameters_of
