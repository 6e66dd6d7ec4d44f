"""Faults of when hooks fire, of what they are told, and of the gradients that they return."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from adapter import attention, compatibility, recompute
from adapter.block import OlmoBlockBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint, new_hook
from conformance.mutants.catalogue import Make, add, mutant


@mutant(
    "firing.told_alias", "an alias, add_hook", "firing.names", OlmoTransformerBridge, "add_hook"
)
def told_alias(original: Any) -> Any:
    """A function that add_hook put on by an alias is told that it is at a hook of that name."""

    def add_hook(self: Any, name: Any, function: Any, *args: Any, **named: Any) -> None:
        def told(tensor: torch.Tensor, hook: HookPoint) -> Any:
            other = new_hook()
            other.name = name
            return function(tensor, hook=other)

        alias = isinstance(name, str) and self.hook_dict[name].name != name
        original(self, name, told if alias else function, *args, **named)

    return add_hook


@mutant("firing.sweep", "a filter", "firing.names", OlmoTransformerBridge, "hooks")
def sweep(original: Any) -> Any:
    """A filter of hooks() puts a function on once for each name of a hook that it matches."""

    def hooks(self: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), **named: Any) -> Any:
        def by_name(pairs: Any) -> list[Any]:
            known = list(self.hook_dict)
            each = [([at] if isinstance(at, str) else filter(at, known), f) for at, f in pairs]
            fires = [(name, f) for names, f in each for name in names]
            return [(n, f) for n, f in fires if self._gated_hook_reason(n) is None]

        return original(self, by_name(fwd_hooks), by_name(bwd_hooks), **named)

    return hooks


def _backward(call: Callable[[Any, Any, Any, torch.Tensor], Any]) -> Make:
    """A hook point calls its backward hooks in another way: given it, its name and a gradient."""

    def make(original: Any) -> Any:
        def register(self: Any, hook: Any, prepend: bool = False) -> RemovableHandle:
            def before(module: nn.Module, into: Any, out: Any) -> Any:
                return call(hook, module, str(self.name), out[0])

            handle: RemovableHandle = original(self, before, prepend)
            return handle

        return register

    return make


def _late(hook: Any, module: Any, name: str, gradient: torch.Tensor) -> Any:
    if not name.endswith("mlp.in.hook_out"):
        return hook(module, (gradient,), (gradient,))
    Variable._execution_engine.queue_callback(lambda: hook(module, (gradient,), (gradient,)))
    return None


def _changed(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    def call(hook: Any, module: Any, name: str, gradient: torch.Tensor) -> Any:
        returned = hook(module, (gradient,), (gradient,))
        return None if returned is None else (change(returned[0], gradient),)

    return call


for name, breaks, killer, call in (
    (
        "late",
        "a backward hook of mlp.in.hook_out is called when the backward is over",
        "firing.reverse",
        _late,
    ),
    (
        "added",
        "a gradient that a hook returns is added to the one it was given",
        "firing.returned_gradients",
        _changed(lambda returned, gradient: returned + gradient),
    ),
    (
        "first_row",
        "of a gradient that a hook returns, only the first row of the batch is taken",
        "firing.returned_gradients",
        _changed(lambda returned, gradient: torch.cat((returned[:1], gradient[1:]))),
    ),
):
    owner, attribute = OlmoHookPoint, "register_full_backward_hook"
    add(f"firing.{name}", breaks, "any", killer, owner, attribute, _backward(call))

# What PyTorch's full backward hooks do, on which TransformerLens builds.
for name, breaks, trigger, killer in (
    (
        "past_the_edit",
        "a returned gradient goes past the derivative of an edit of the value there",
        "an edit of a value and of its gradient",
        "firing.returned_gradients",
    ),
    (
        "last_wins",
        "of several hooks that return a gradient only the last counts",
        "edits of one gradient",
        "hook_api.order",
    ),
):
    add(
        f"firing.{name}",
        breaks,
        trigger,
        killer,
        OlmoHookPoint,
        "register_full_backward_hook",
        lambda original: HookPoint.register_full_backward_hook,
    )


@mutant(
    "firing.very_gradient",
    "an edit in place of what a block adds to the residual stream",
    "firing.returned_gradients",
    OlmoHookPoint,
    "register_full_backward_hook",
)
def very_gradient(original: Any) -> Any:
    """Backward hooks get the very tensor that flows on, also past them."""

    def register(self: Any, hook: Any, prepend: bool = False) -> RemovableHandle:
        handle: RemovableHandle = self.register_full_backward_pre_hook(
            lambda module, gradient: hook(module, gradient, gradient), prepend=prepend
        )
        return handle

    return register


def _deaf(hook: Any, module: Any, name: str, gradient: torch.Tensor) -> Any:
    own = (gradient.clone(),)
    return hook(module, own, own)


add(
    "firing.written_lost",
    "a gradient that a backward hook has written to and not returned stays what it was",
    "an edit in place",
    "firing.returned_gradients",
    OlmoHookPoint,
    "register_full_backward_hook",
    _backward(_deaf),
)

add(
    "recompute.forgotten",
    "a recomputed block has the hooks of the day, and not those of its forward",
    "gradient checkpointing, an edit whose hook is gone",
    "firing.recomputed",
    recompute,
    "_put_back",
    lambda original: lambda hooks: nullcontext(),
)


@mutant(
    "recompute.dropout",
    "gradient checkpointing, dropout",
    "firing.recomputed",
    attention,
    "dropout",
)
def dropout(original: Any) -> Any:
    """Attention drops nothing where a block is recomputed."""

    def drop(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        again = torch._C._current_graph_task_id() != -1  # in the midst of a backward
        dropped: torch.Tensor = original(x, p=p, training=training)
        return x if again else dropped

    return drop


add(
    "gates.always_open",
    "hook_mlp_in fires without its flag",
    "any",
    "firing.gated",
    OlmoBlockBridge,
    "_read_use_hook_mlp_in",
    lambda original: lambda self: True,
)


@mutant(
    "gates.normalized",
    "use_split_qkv_input or use_attn_in",
    "firing.gated",
    attention,
    "change_of_heads",
)
def normalized(original: Any) -> Any:
    """The hooks of the heads' inputs carry what is behind ln1."""
    return lambda residual, norm, *rest: original(norm(residual), nn.Identity(), *rest)


@mutant(
    "gates.heads", "use_attn_result, two heads", "firing.gated", attention, "head_contributions"
)
def heads(original: Any) -> Any:
    """Hook_result carries the heads in reverse."""

    def contributions(z: torch.Tensor, projection: Any, d_head: int, hook: Any) -> Any:
        return original(z, projection, d_head, lambda x: hook(x.flip(2)).flip(2))

    return contributions


add(
    "gates.alias_cached",
    "caching a gated hook by an alias is not refused without its flag",
    "an alias",
    "firing.refused",
    compatibility,
    "refuse_gated",
    lambda original: (
        lambda bridge, names: original(
            bridge, [n for n in names if ".attn.hook_" in n] if isinstance(names, list) else names
        )
    ),
)


@mutant("gates.left_behind", "any", "firing.refused", OlmoTransformerBridge, "run_with_hooks")
def left_behind(original: Any) -> Any:
    """What run_with_hooks has put on before it refuses a hook stays."""

    def run(self: Any, tokens: Any, fwd_hooks: Any = (), *args: Any, **named: Any) -> Any:
        try:
            return original(self, tokens, list(fwd_hooks), *args, **named)
        except ValueError:
            for name, function in list(fwd_hooks)[:1]:
                self.add_hook(name, function)
            raise

    return run
