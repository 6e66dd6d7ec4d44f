"""Faults that a review of the adapter has found: of hooks, flags, threads and checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformer_lens.model_bridge.generalized_components import BlockBridge

from adapter import attention, recompute, running
from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import mutant


@mutant(
    "firing.uncounted",
    "an edit in place through .data",
    "firing.returned_gradients",
    OlmoHookPoint,
    "register_full_backward_hook",
)
def _(_original: Any) -> Any:
    """A gradient that is written to through .data stays what it was."""

    def register(self: Any, hook: Any, prepend: bool = False) -> RemovableHandle:
        def before(module: Any, gradients: Any) -> Any:
            own = tuple(None if gradient is None else gradient.clone() for gradient in gradients)
            returned = hook(module, own, own)
            written = any(gradient is not None and gradient._version for gradient in own)
            return own if returned is None and written else returned

        handle: RemovableHandle = self.register_full_backward_pre_hook(before, prepend=prepend)
        return handle

    return register


@mutant(
    "recompute.flags_of_today",
    "a flag that is off by the time of the backward",
    "firing.recomputed",
    recompute,
    "_settings_of",
)
def _(original: Any) -> Any:
    """A recomputed block has the hooks of its forward, and the flags of the day."""

    def settings_of(module: torch.nn.Module) -> Any:
        return [pair for pair in original(module) if "_forward_hooks" in pair[1]]

    return settings_of


class _First(running.Run):
    """Keeps what any LayerNorm before attention has read first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, name, None) is None:
            super().__setattr__(name, value)


@mutant(
    "nested.first_norm",
    "a per-head flag, a hook before ln1 that calls it",
    "hook_api.nested",
    OlmoBlockBridge,
    "_hook_input_hidden_states",
)
def _(_original: Any) -> Any:
    """What heads are copies of is what ln1 is first called with, be it by a hook."""

    def hook_input(self: Any, *args: Any) -> Any:
        running._HERE.run = _First(self)
        return BlockBridge._hook_input_hidden_states(self, *args)

    return hook_input


@mutant("nested.threads", "a per-head flag, two threads", "hook_api.nested", running, "_HERE")
def _(_original: Any) -> Any:
    """Threads share what a layer's LayerNorm leaves for its attention."""
    return SimpleNamespace(run=None)


@mutant(
    "copies.in_midst",
    "a copy that a hook makes",
    "copies.deepcopy",
    OlmoAttentionBridge,
    "_project",
)
def _(original: Any) -> Any:
    """Attention keeps a tensor of its run: one that is of a graph cannot be copied."""

    def project(self: Any, hidden_states: torch.Tensor, residual: Any) -> Any:
        vars(self)["_residual"] = residual
        try:
            return original(self, hidden_states, residual)
        finally:
            del vars(self)["_residual"]

    return project


@mutant(
    "derivatives.flagged",
    "vmap under a per-head flag",
    "derivatives.transformed",
    attention,
    "is_known_in",
)
def _(_original: Any) -> Any:
    """Whether two edits contradict each other is asked also where nothing may be asked."""
    return lambda condition: bool(condition.any())
