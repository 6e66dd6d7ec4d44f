"""Faults of hooks where they are rarely used: what they add or return, and under what they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter import attention
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint, is_hooked
from conformance.mutants.catalogue import Make, add, mutant
from conformance.mutants.modes import in_a_backward


@mutant("training.steering_frozen", "a frozen model", "training.frozen", OlmoHookPoint, "__call__")
def steering_frozen(original: Any) -> Any:
    """Where nothing before it is trained, what a hook adds gets no gradient."""

    def call(self: Any, x: torch.Tensor, *args: Any) -> Any:
        result = original(self, x, *args)
        return result if x.requires_grad else result.detach()

    return call


def _by_memory(x: torch.Tensor) -> torch.Tensor:
    """What lies in a tensor's memory, from its beginning, in the tensor's shape."""
    room = min(x.untyped_storage().nbytes() // x.element_size(), x.numel())
    times = -(-x.numel() // room)
    return x.as_strided((room,), (1,), 0).repeat(times)[: x.numel()].view(x.shape)


def _reading_memory(site: str) -> Make:
    """Hook points at a site take what a hook returns for contiguous."""

    def make(original: Any) -> Any:
        def add_hook(self: Any, hook: Any, *args: Any, **kwargs: Any) -> Any:
            def reading(tensor: torch.Tensor, hook: Any, inner: Any = hook) -> Any:
                returned = inner(tensor, hook=hook)
                strided = returned is not None and not returned.is_contiguous()
                return _by_memory(returned) if strided else returned

            chosen = reading if str(self.name).endswith(site) else hook
            return original(self, chosen, *args, **kwargs)

        return add_hook

    return make


for site in ("attn.hook_pattern", "mlp.hook_out", "blocks.0.hook_in", "hook_rot_q"):
    add(
        f"interventions.by_memory_at_{site.replace('.', '_')}",
        f"what a hook of {site} returns is read as if it lay in one piece",
        "a strided tensor, or one that is expanded",
        "interventions.layouts",
        OlmoHookPoint,
        "add_hook",
        _reading_memory(site),
    )


@mutant(
    "flags.recomputed_unedited",
    "checkpointing, an edit of what a head reads",
    "firing.recomputed",
    attention,
    "project_change",
)
def recomputed_unedited(original: Any) -> Any:
    """What checkpointing computes again lacks the edits of hook_q_input and the like."""
    return lambda change, *rest: original(change * (0 if in_a_backward() else 1), *rest)


@mutant(
    "flags.autocast_unedited",
    "an edit of hook_result",
    "modes.autocast",
    attention,
    "head_contributions",
)
def autocast_unedited(original: Any) -> Any:
    """Under autocast what a hook of hook_result returns is lost."""

    def contributions(z: torch.Tensor, projection: Any, **rest: Any) -> Any:
        output = original(z, projection, **rest)
        return projection(z) if torch.is_autocast_enabled("cpu") else output

    return contributions


add(
    "flags.autocast_wide",
    "under autocast edited results of heads leave the output wider than Hugging Face does",
    "an edit of hook_result",
    "modes.autocast",
    attention,
    "head_contributions",
    lambda original: (
        lambda z, **rest: (
            original(z, **rest).float() if torch.is_autocast_enabled("cpu") else original(z, **rest)
        )
    ),
)


@mutant(
    "flags.inference_empty",
    "use_attn_result",
    "modes.inference",
    attention,
    "head_contributions",
)
def inference_empty(original: Any) -> Any:
    """Under inference mode hook_result shows zeros, and what it returns is lost."""

    def contributions(z: torch.Tensor, projection: Any, d_head: int, hook: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return original(z, projection, d_head, hook)
        hook(z.new_zeros(*z.shape[:2], z.shape[-1] // d_head, projection.out_features))
        return projection(z)

    return contributions


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(min(1, x.ndim - 1))


def _on_gradients(option: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    """The gradients of run_with_cache(incl_bwd=True) are spoiled under another option."""

    def make(original: Any) -> Any:
        def run_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
            output, cache = original(self, *args, **kwargs)
            for name in list(cache.keys()) if kwargs.get(option) is not None else ():
                if name.endswith("_grad"):
                    cache[name].copy_(spoil(cache[name]))
            return output, cache

        return run_with_cache

    return make


for name, breaks, option, spoil in (
    ("sliced", "with a pos_slice the kept gradients are in reverse", "pos_slice", _reverse),
    ("batchless", "without a batch the kept gradients are doubled", "remove_batch_dim", _double),
):
    add(
        f"caching.gradients_{name}",
        breaks,
        option,
        "caching.incl_bwd",
        OlmoTransformerBridge,
        "run_with_cache",
        _on_gradients(option, spoil),
    )


class _Deaf(OlmoHookPoint):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


@mutant(
    "hook_api.added_midway",
    "a hook that adds a hook",
    "hook_api.order",
    OlmoTransformerBridge,
    "forward",
)
def added_midway(original: Any) -> Any:
    """A hook point where nothing was hooked when a forward began has no hooks in it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        points = [point for point in self.hook_dict.values() if not is_hooked(point)]
        for point in points:
            point.__class__ = _Deaf
        try:
            return original(self, *args, **kwargs)
        finally:
            for point in points:
                point.__class__ = OlmoHookPoint

    return forward


@mutant(
    "hook_api.removed_midway",
    "a hook that removes a hook",
    "hook_api.order",
    OlmoTransformerBridge,
    "forward",
)
def removed_midway(original: Any) -> Any:
    """remove_hooks() of a hook point does nothing while a forward runs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        points = {id(point): point for point in self.hook_dict.values()}.values()
        for point in points:
            vars(point)["remove_hooks"] = lambda *args, **kwargs: None
        try:
            return original(self, *args, **kwargs)
        finally:
            for point in points:
                del vars(point)["remove_hooks"]

    return forward
