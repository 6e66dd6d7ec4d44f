"""Faults that a review of the adapter has found: of hooks, flags, threads and checkpoints."""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle

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
