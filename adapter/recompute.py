"""Gradient checkpointing runs a block again in the backward: with its forward's hooks and flags.

A hook of ``run_with_hooks`` or ``hooks()`` is gone by the time of the backward, and a flag may be
off again. The block would compute other activations than the forward did, and PyTorch, which
compares only their number and shapes, would make gradients of them and say nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from adapter.gates import GATES
from adapter.running import begin, set_apart

_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    # How the hooks of those numbers are called.
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"),
    "_forward_hooks_always_called",
)
# The last one is where a block without a configuration has its flag.
_FLAGS = (*sorted(set(GATES.values())), "_use_hook_mlp_in")

# Of each hook point, component and configuration: its attributes, and some that it once had.
Settings = list[tuple[dict[str, Any], dict[str, Any]]]


def _settings_of(block: torch.nn.Module) -> Settings:
    """Every hook and flag in a block as it is now."""
    settings: Settings = []
    for module in block.modules():
        names = _HOOKS if isinstance(module, HookPoint) else _FLAGS
        for owner in (module, vars(module).get("config")):
            own = getattr(owner, "__dict__", {})
            if then := {name: copy.copy(own[name]) for name in names if name in own}:
                settings.append((own, then))
    return settings


@contextmanager
def _put_back(settings: Settings) -> Iterator[None]:
    """Give hook points the hooks that they once had, and flags their values, for a while."""
    today = [(own, {name: own[name] for name in then}) for own, then in settings]
    try:
        for own, then in settings:
            own.update(then)
        yield
    finally:
        for own, now in today:
            own.update(now)


class _Checkpoint:
    """A layer's checkpoint function, which remembers what hooks and flags its block has.

    It stays with the layer, which is shared by threads and copied with its block.
    """

    def __init__(self, block: torch.nn.Module, function: Callable[..., Any]) -> None:
        self.block, self.function = block, function

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        """Run a layer's forward, which may be run again."""
        settings = _settings_of(self.block)
        ran = False

        def run(*args: Any) -> Any:
            nonlocal ran
            # The forward itself runs as it is: a hook may well add or remove hooks.
            with _put_back(settings) if ran else nullcontext(), set_apart():
                ran = True
                begin(self.block)
                return layer(*args)

        return self.function(run, *args)


def recompute_alike(block: torch.nn.Module, layer: Any) -> None:
    """Let a layer's checkpoint remember hooks and flags, if the layer has one.

    Args:
        block: The bridge of the block.
        layer: The Hugging Face layer that it wraps, which calls the checkpoint.
    """
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if isinstance(function, _Checkpoint):
        function = function.function if function.block is not block else None
    if function is not None:
        layer._gradient_checkpointing_func = _Checkpoint(block, function)
