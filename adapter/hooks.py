"""TransformerLens hook points whose hooks reach what reads the tensor there, and nothing else."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from adapter.partial_runs import call_of_its_own, current_call, of_another

# What takes no part in a search for what else is to be copied: exactly these types, no subclass.
_BARE = (type(None), bool, int, float, str)
_HOLDERS = (dict, list, set, OrderedDict)


class _Hook:
    """What TransformerLens is given for a user's hook."""

    def __init__(self, point: HookPoint, hook: Callable[..., Any]) -> None:
        self._point, self._hook = point, hook

    def __repr__(self) -> str:
        # TransformerLens names PyTorch's hook after it, and what a partial holds may be large.
        hook = self._hook
        return f"partial({hook.func!r},...)" if isinstance(hook, partial) else repr(hook)


class _OnRoute(_Hook):
    """A forward hook whose tensor flows on even if it returns None.

    At a point with a conversion a hook sees a view of its own. Unless the view is handed back, the
    computation goes past it, and neither ``retain_grad()`` nor ``autograd.grad`` finds a gradient.

    What a hook calls is no part of the run that the hook is in. One that stops or caches the run of
    its own call lets the runs of other hooks, and of threads, go on as they are.
    """

    def __init__(self, point: HookPoint, hook: Callable[..., Any]) -> None:
        super().__init__(point, hook)
        self._call = current_call()
        self._caches = self._call is not None and self._call.caches

    def __call__(self, tensor: torch.Tensor, hook: Any) -> Any:
        elsewhere = of_another(self._call)
        if elsewhere and self._caches:
            return tensor
        try:
            with call_of_its_own():
                returned = self._hook(tensor, hook=hook)
        except StopAtLayerException:
            if elsewhere:
                return tensor
            raise
        viewed = returned is None and self._point.hook_conversion is not None
        return tensor if viewed and tensor.requires_grad else returned


class _Unwrapped(_Hook):
    """A backward hook that may return its gradient in a tuple of one, as PyTorch's do.

    A conversion, and a hook under the next of several names, take a tensor.
    """

    def __call__(self, gradient: torch.Tensor, hook: Any) -> Any:
        returned = self._hook(gradient, hook=hook)
        return returned[0] if isinstance(returned, tuple) and len(returned) == 1 else returned


def _same_hook(handle: Any, memo: dict[int, Any]) -> Any:
    """A copy of a handle. The hook itself is the user's, and no part of what is copied."""
    twin = copy.copy(handle)
    twin.hook = copy.deepcopy(handle.hook, memo)
    return twin


class OlmoHookPoint(HookPoint):
    """A hook point that is a place of its own in the computation, forwards and backwards.

    Forward hooks get a copy. Neighbouring hook points show one and the same tensor, which siblings
    read too: without the copy an in-place edit at one of them would also reach the siblings, what a
    cache keeps of the neighbours, and the caller's own tokens.

    Backward hooks see, and may replace, the gradient of the tensor that the forward hooks left,
    each what the one before it returned. PyTorch's full backward hooks, on which TransformerLens
    builds, show all of them the same gradient, and take what the last one returns for that of the
    tensor before the forward hooks, past the derivative of their edits. They get a copy too: the
    gradient of what a block adds to the residual stream is, as an object, the stream's own.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass ``x`` on, or a copy of it for the hooks."""
        return x.clone() if is_hooked(self) else x

    def add_hook(
        self,
        hook: Callable[..., Any],
        dir: Any = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> Any:
        """Add a hook as TransformerLens does; what a forward hook sees is on the gradient's way."""
        given: Any = _OnRoute(self, hook) if dir == "fwd" else _Unwrapped(self, hook)
        super().add_hook(given, dir, is_permanent, level, prepend, alias_names)
        # Before 4.3 it is not returned.
        handle: Any = (self.fwd_hooks if dir == "fwd" else self.bwd_hooks)[0 if prepend else -1]
        handle.user_hook, handle.alias_names = hook, alias_names
        return handle

    def __dir__(self) -> list[str]:
        """Name what is public and a hook point's own, and not all that any module has.

        TransformerLens asks every module for everything that it names, twice, when it builds a
        bridge; most modules are hook points.
        """
        return [*_PUBLIC, *(name for name in vars(self) if name[0] != "_")]

    def train(self, mode: bool = True) -> OlmoHookPoint:
        """Change the mode, which means nothing here, without a search for modules below.

        Whoever changes a bridge's mode changes that of more hook points than of other modules.
        """
        if not isinstance(mode, bool):
            raise ValueError(f"training mode is expected to be boolean, not {mode!r}")
        object.__setattr__(self, "training", mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OlmoHookPoint:
        """Copy as any object is copied, only faster: nearly all that a hook point holds is empty.

        TransformerLens copies a whole block, most of which is hook points, for every layer.
        """
        new = memo[id(self)] = type(self).__new__(type(self))
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        for name, value in state.items():
            if name in ("fwd_hooks", "bwd_hooks"):
                state[name] = [_same_hook(handle, memo) for handle in value]
            elif type(value) in _HOLDERS and not value:
                # The handles of hooks refer to these too.
                state[name] = memo.setdefault(id(value), type(value)())
            elif type(value) not in _BARE:
                state[name] = copy.deepcopy(value, memo)
        new.__setstate__(state)  # type: ignore[no-untyped-call]
        new._take_over("fwd", new.fwd_hooks, new._forward_hooks)
        new._take_over("bwd", new.bwd_hooks, new._backward_pre_hooks)
        return new

    def _take_over(self, dir: str, handles: list[Any], hooks: dict[int, Any]) -> None:
        """Register copied hooks anew, so that they are given this hook point and its ``ctx``."""
        for handle in list(handles):
            if handle.hook.id in hooks:  # else it was taken off by PyTorch's own means
                again = self.add_hook(handle.user_hook, dir, alias_names=handle.alias_names)
                handles.remove(again)
                # Under its old number it keeps its turn, and its handle takes it off.
                hooks[handle.hook.id] = hooks.pop(again.hook.id)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook`` with the gradient of what leaves this point, before it flows on."""

        def before(module: torch.nn.Module, gradients: Any) -> Any:
            own = tuple(None if gradient is None else gradient.clone() for gradient in gradients)
            returned = hook(module, own, own)
            # Nothing tells whether it was written to: through ``.data`` or NumPy no version counts.
            return own if returned is None else returned

        before.__name__ = getattr(hook, "__name__", repr(hook))
        return self.register_full_backward_pre_hook(before, prepend=prepend)


_PUBLIC = tuple(
    name for kind in (HookPoint, OlmoHookPoint) for name in vars(kind) if name[0] != "_"
)


def new_hook() -> HookPoint:
    """Make a hook point (whose own signature has no types)."""
    return OlmoHookPoint()  # type: ignore[no-untyped-call]


def is_hooked(point: HookPoint) -> bool:
    """Whether anything listens at ``point``, through TransformerLens or plain PyTorch."""
    return bool(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    )


def adopt(component: GeneralizedComponent) -> None:
    """Make the hook points that TransformerLens has created in a component, and below it, ours."""
    for point in component.modules():
        if type(point) is HookPoint:
            point.__class__ = OlmoHookPoint
    for below in component.submodules.values():
        adopt(below)


def drop_hook(component: GeneralizedComponent, name: str) -> None:
    """Remove a hook point that the component would advertise and never fire."""
    delattr(component, name)
    component._hook_registry.pop(name, None)
