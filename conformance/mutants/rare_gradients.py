"""Faults of gradients by rare routes, and of what errors and hooks leave behind."""

from __future__ import annotations

from typing import Any

from adapter import hooks
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import add, mutant


@mutant("hooks.off_route", "a hook on the tensor", "hooks.gradients", OlmoHookPoint, "add_hook")
def off_route(original: Any) -> Any:
    """Hooks see a view past which the computation goes, unless they return it."""

    def add_hook(self: Any, hook: Any, dir: str = "fwd", *args: Any, **named: Any) -> Any:
        def beside(tensor: Any, hook: Any, inner: Any = hook) -> Any:
            return inner(tensor[...], hook=hook)

        return original(self, beside if dir == "fwd" else hook, dir, *args, **named)

    return add_hook


add(
    "hooks.heads_off_route",
    "the computation goes past the view by heads that a hook sees, unless it is returned",
    "a hook on the tensor",
    "hooks.gradients",
    hooks._OnRoute,
    "__call__",
    lambda original: lambda self, tensor, hook: self._hook(tensor, hook=hook),
)


@mutant(
    "derivatives.edit_detached",
    "a returned gradient",
    "derivatives.second",
    OlmoHookPoint,
    "register_full_backward_hook",
)
def edit_detached(original: Any) -> Any:
    """What a backward hook is given, and so what it returns, has no derivative."""

    def register(self: Any, hook: Any, prepend: bool = False) -> Any:
        def detached(module: Any, into: Any, out: Any) -> Any:
            own = tuple(None if each is None else each.detach().clone() for each in out)
            return hook(module, own, own)

        return original(self, detached, prepend)

    return register
