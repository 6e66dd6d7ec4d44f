"""Gradient checkpointing runs a block again in the backward: with the hooks of its forward.

A hook of ``run_with_hooks`` or ``hooks()`` is gone by the time of the backward. Without it the
block would compute other activations than the forward did, and PyTorch, which compares only their
number and shapes, would make gradients of them and say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    # How the hooks of those numbers are called.
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"),
    "_forward_hooks_always_called",
)

Hooks = list[tuple[HookPoint, dict[str, Any]]]


def _hooks_of(block: torch.nn.Module) -> Hooks:
    """Every hook in a block as it is now."""
    points = [module for module in block.modules() if isinstance(module, HookPoint)]
    return [(point, {name: vars(point)[name].copy() for name in _HOOKS}) for point in points]


@contextmanager
def _put_back(hooks: Hooks) -> Iterator[None]:
    """Give hook points the hooks that they once had, for a while."""
    today = [(point, {name: vars(point)[name] for name in _HOOKS}) for point, _ in hooks]
    try:
        for point, then in hooks:
            vars(point).update(then)
        yield
    finally:
        for point, now in today:
            vars(point).update(now)


@contextmanager
def same_hooks_again(block: torch.nn.Module, layer: Any) -> Iterator[None]:
    """While a block runs, let its checkpoint remember which hooks the block has.

    Args:
        block: The bridge of the block.
        layer: The Hugging Face layer that it wraps, which calls the checkpoint.
    """
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None or not (layer.gradient_checkpointing and layer.training):
        yield
        return

    def remembering(function: Callable[..., Any], *args: Any) -> Any:
        hooks = _hooks_of(block)
        ran = False

        def run(*args: Any) -> Any:
            nonlocal ran
            # The forward itself runs as it is: a hook may well add or remove hooks.
            with _put_back(hooks) if ran else nullcontext():
                ran = True
                return function(*args)

        return checkpoint(run, *args)

    layer._gradient_checkpointing_func = remembering
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint
