"""Faults in what a hook may do besides to edit: keep its tensor, and run the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import BlockBridge

from adapter import block, running
from adapter.block import OlmoBlockBridge
from adapter.hooks import OlmoHookPoint, is_hooked
from adapter.unembedding import OlmoUnembeddingBridge
from conformance.mutants.catalogue import mutant


@mutant("kept.stops", "stop_at_layer", "hook_api.kept", OlmoBlockBridge, "_check_stop_at_layer")
def stops(original: Any) -> Any:
    """A run that stops at a layer returns the very tensor that a hook has seen."""
    return lambda self, *args, **kwargs: BlockBridge._check_stop_at_layer(self, *args, **kwargs)


@mutant(
    "kept.once", "a hook that removes itself", "hook_api.kept", OlmoUnembeddingBridge, "forward"
)
def once(original: Any) -> Any:
    """Whether the logits are the caller's own is asked when the hooks have run."""

    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        logits = super(OlmoUnembeddingBridge, self).forward(hidden_states)
        return logits.clone() if is_hooked(self.hook_out) else logits

    return forward


@mutant("nested.forgets", "a per-head flag", "hook_api.nested", block, "set_apart")
def forgets(original: Any) -> Any:
    """A run within a hook forgets the residual stream that the run around has captured."""

    @contextmanager
    def set_apart() -> Iterator[None]:
        with original():
            yield
        running._HERE.run = None

    return set_apart


@mutant("nested.silent", "an edit", "hook_api.nested", OlmoHookPoint, "__call__")
def silent(original: Any) -> Any:
    """While a hook runs, no other is called."""
    busy: list[Any] = []

    def call(self: Any, x: torch.Tensor) -> Any:
        if busy:
            return x
        busy.append(self)
        try:
            return original(self, x)
        finally:
            busy.clear()

    return call


@mutant("nested.own_point", "any", "hook_api.nested", OlmoHookPoint, "__call__")
def own_point(original: Any) -> Any:
    """A point that one of its hooks leads to again is silent there."""
    busy: set[int] = set()

    def call(self: Any, x: torch.Tensor) -> Any:
        if id(self) in busy:
            return x
        busy.add(id(self))
        try:
            return original(self, x)
        finally:
            busy.discard(id(self))

    return call
