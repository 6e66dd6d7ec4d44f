"""Small helpers over TransformerLens hook points."""

from __future__ import annotations

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


def new_hook() -> HookPoint:
    """Make a hook point (whose own signature has no types)."""
    return HookPoint()  # type: ignore[no-untyped-call]


def is_hooked(point: HookPoint) -> bool:
    """Whether anything listens at ``point``, through TransformerLens or plain PyTorch."""
    return bool(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    )


def isolated(tensor: torch.Tensor, point: HookPoint) -> torch.Tensor:
    """Give ``point`` a copy of ``tensor`` when someone could edit it in place there.

    Sibling branches read the same tensor; without the copy an in-place edit meant for one of
    them would reach all.
    """
    return tensor.clone() if is_hooked(point) else tensor


def drop_hook(component: GeneralizedComponent, name: str) -> None:
    """Remove a hook point that the component would advertise and never fire."""
    delattr(component, name)
    component._hook_registry.pop(name, None)
