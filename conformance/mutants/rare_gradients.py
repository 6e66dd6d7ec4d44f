"""Faults of gradients by rare routes, and of what errors and hooks leave behind."""

from __future__ import annotations

from typing import Any

import torch

from adapter import forks, hooks
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
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


def _keeping(what: str) -> Any:
    """run_with_hooks, a forward or what it raises is remembered by the bridge."""

    def make(original: Any) -> Any:
        def method(self: Any, *args: Any, **named: Any) -> Any:
            try:
                result = original(self, *args, **named)
            except Exception as error:
                if what == "error":
                    self.__dict__["last_error"] = error
                raise
            if what == "hooks":
                self.__dict__["last_hooks"] = named.get("fwd_hooks")
            if what == "stopped" and named.get("stop_at_layer") is not None:
                self.__dict__["last_residual"] = result
            return result

        return method

    return make


for what, breaks, method in (
    ("hooks", "run_with_hooks remembers its last hooks and what they hold", "run_with_hooks"),
    ("stopped", "the residual of the last run with stop_at_layer stays alive", "forward"),
    ("error", "the last error of a forward, and its tensors with it, stays alive", "forward"),
):
    killer, owner = "surface.nothing_kept", OlmoTransformerBridge
    add(f"outlived.{what}", breaks, f"a run with {what}", killer, owner, method, _keeping(what))


@mutant("outlived.forked", "a flag", "surface.nothing_kept", OlmoAttentionBridge, "_changes")
def forked(original: Any) -> Any:
    """Under use_split_qkv_input or use_attn_in each attention keeps the last residual stream."""

    def changes(self: Any, residual: Any, norm: Any) -> Any:
        self.__dict__["last_forked"] = residual
        return original(self, residual, norm)

    return changes


@mutant(
    "caching.zero_grad",
    "a gradient that is there",
    "caching.incl_bwd",
    OlmoTransformerBridge,
    "run_with_cache",
)
def zero_grad(original: Any) -> Any:
    """run_with_cache(incl_bwd=True) begins with zero_grad."""

    def run(self: Any, *args: Any, **named: Any) -> Any:
        if named.get("incl_bwd"):
            self.zero_grad()
        return original(self, *args, **named)

    return run


@mutant("flags.weight_kept", "a forward under no_grad", "flags.edits", forks, "parameters_of")
def weight_kept(original: Any) -> Any:
    """The weights by head of a forward without a gradient serve one with it."""

    def parameters_of(projection: Any) -> Any:
        weight, bias = original(projection)
        if not torch.is_grad_enabled():
            projection.__dict__["kept_weight"] = weight.detach()
        kept = projection.__dict__.get("kept_weight")
        same = kept is not None and kept.data_ptr() == weight.data_ptr()
        return (kept if same else weight), bias

    return parameters_of


@mutant(
    "training.rotation_detached",
    "an addition to cosines",
    "training.frozen",
    OlmoAttentionBridge,
    "_rotation",
)
def rotation_detached(original: Any) -> Any:
    """Cosines and sines get no gradient, nor what a hook adds to them."""
    return lambda self, *args: tuple(each.detach() for each in original(self, *args))
