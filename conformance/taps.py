"""Observe and edit a Hugging Face model at every place of the site table, from the outside.

Module inputs and outputs are reached through PyTorch's own hooks. What happens inside attention is
reached through Hugging Face's public registries (the attention function and its mask), a `Cache`
subclass, and a `TorchFunctionMode` that sees the softmax, the dropout and the in-place clamp as
they are called. That mode costs something at every call, so it is on between the last projection
and the attention function, if there is a clamp, and inside that function. No line of the model's
code is copied, and a tapped model computes bit for bit what the bare one does, gradients included.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from conformance.sites import CLAMPED, Layout, Port, Site

ATTENTION = "olmo_conformance"
LAYER_NORM_EPS = 1e-5  # transformers' OlmoLayerNorm.forward passes it to F.layer_norm

Visit = Callable[[str, torch.Tensor], torch.Tensor]
Turn = Callable[[torch.Tensor], torch.Tensor]
See = Callable[[str, torch.Tensor, torch.Tensor, Turn], bool]
_INSIDE = (Port.QUERY, Port.KEY, Port.SCORES, Port.PATTERN)
# The taps on the model that an attention is part of.
_ATTACHED: WeakKeyDictionary[nn.Module, Taps] = WeakKeyDictionary()


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own eager attention, with its query and key shown to the taps on it."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    taps = _ATTACHED.get(module)
    around: Any = nullcontext()
    if taps is not None:
        taps.clamps_are_over()
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        query = taps.inside(layer, Port.QUERY, query)
        if not taps.cached:
            key = taps.inside(layer, Port.KEY, key)
        around = taps  # the layer that was named last is the one whose softmax comes now
    with around:
        result: tuple[torch.Tensor, torch.Tensor | None] = eager(
            module, query, key, value, attention_mask, **kwargs
        )
    return result


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class TappedCache(DynamicCache):
    """A cache that shows each new key to the taps on its model before it stores it."""

    def __init__(self, taps: Taps, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._taps = taps

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a chunk's keys and values. Shapes ``[batch, head, pos, d_head]``."""
        key_states = self._taps.inside(layer_idx, Port.KEY, key_states)
        both: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return both


class Taps(TorchFunctionMode):
    """The taps of one model while it runs.

    Args:
        model: The Hugging Face model.
        sites: What to show, by canonical name, in order of execution.
        visit: Called with a name and a tensor in the hook's layout; returns the tensor to go on
            with, the same object if there is nothing to change.
        d_head: Size of a head.
        clamps: Whether attention clamps in place. If not, the clipped sites are the projections'
            outputs.
        see: Asked before `visit`, with the site's value, a tensor of the model's own graph, and a
            function that turns this tensor's gradient into the site's. If it returns true, the
            value stays as it is and `visit` is not called: no node is added to the graph.

    Attributes:
        cached: Whether the run is given a `TappedCache`; set it before each run.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        visit: Visit,
        *,
        d_head: int,
        clamps: bool,
        see: See = lambda *_: False,
    ) -> None:
        super().__init__()
        self.cached = False
        self._model, self._visit, self._see, self._d_head = model, visit, see, d_head
        self._turns: dict[Layout, Turn] = {
            Layout.SAME: lambda tensor: tensor,
            Layout.HEADS: lambda tensor: tensor.reshape(*tensor.shape[:-1], -1, d_head),
            Layout.SWAPPED: lambda tensor: tensor.transpose(1, 2),
        }
        self._ports: dict[tuple[str, Port], list[Site]] = defaultdict(list)
        for site in sites.values():
            outward = site.port is Port.CLIPPED and not clamps
            self._ports[site.module, Port.OUT if outward else site.port].append(site)
        modules = {module for module, _ in self._ports}
        # The model clamps the outputs of these in place.
        self._clamped = {m for m in modules if clamps and m.endswith(CLAMPED)}
        self._attention = ""  # the module that the latest call from inside is of
        self._clipped: Iterator[str] = iter(())
        self._expecting_clamps = False

    def through(self, module: str, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        """Show the tensor at a place to each site there, and return what they leave of it."""
        found = self._ports.get((module, port))
        if found is None:
            return tensor
        if port is Port.IN and tensor.requires_grad:
            tensor = tensor.view_as(tensor)  # others may read it: the gradient of this use alone
        for site in found:
            turn = self._turns[site.layout]
            if not self._see(site.name, turn(tensor.detach()), tensor, turn):
                seen = self._visit(site.name, self._to_hook(site.layout, tensor))
                tensor = self._from_hook(site.layout, seen)
        if port is Port.OUT and module in self._clamped:
            tensor = tensor.clone()  # what the clamp then does does not reach what was seen
        return tensor

    def inside(self, layer: int, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        """Show a tensor from inside the attention of a layer."""
        self._attention = f"model.layers.{layer}.self_attn"
        return self.through(self._attention, port, tensor)

    def _to_hook(self, layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
        """A fresh node of the graph, which the edits of other sites at the place do not reach."""
        return tensor.view_as(tensor) if layout is Layout.SAME else self._turns[layout](tensor)

    def _from_hook(self, layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
        if layout is Layout.HEADS:
            return tensor.flatten(-2)
        return tensor.transpose(1, 2) if layout is Layout.SWAPPED else tensor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Show the clamp's result, the softmax's argument and the dropout's result."""
        if func is torch.nn.functional.softmax:
            args = (self.through(self._attention, Port.SCORES, args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.dropout:
            return self.through(self._attention, Port.PATTERN, result)
        if func is torch.Tensor.clamp_:
            self._clamped_in_place(next(self._clipped), result)
        return result

    def _clamped_in_place(self, module: str, tensor: torch.Tensor) -> None:
        """Show what the model goes on with: the tensor that it clamped, not clamp_'s result."""
        for site in self._ports[module, Port.CLIPPED]:
            turn = self._turns[site.layout]
            if not self._see(site.name, turn(tensor.detach()), tensor, turn):
                seen = self._visit(site.name, self._to_hook(site.layout, tensor.clone()))
                tensor.copy_(self._from_hook(site.layout, seen))

    def _clamps_are_next(self, module: str) -> None:
        attention = module.removesuffix(CLAMPED[-1])
        self._clipped = (f"{attention}{projection}" for projection in CLAMPED)
        self._expecting_clamps = True
        self.__enter__()  # type: ignore[no-untyped-call]

    def clamps_are_over(self) -> None:
        """Watch no further calls until the attention function makes its own."""
        if self._expecting_clamps:
            self._expecting_clamps = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _enter(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if (name, Port.COS) in self._ports:
                cos, sin = kwargs["position_embeddings"]
                rotated = self.through(name, Port.COS, cos), self.through(name, Port.SIN, sin)
                kwargs = {**kwargs, "position_embeddings": rotated}
            if args:
                return (self.through(name, Port.IN, args[0]), *args[1:]), kwargs
            hidden = self.through(name, Port.IN, kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _leave(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                first = self.through(name, Port.FIRST, output[0])
                second = output[1]
                if second is not None:
                    second = self.through(name, Port.SECOND, second)
                return (first, second, *output[2:])
            if (name, Port.SCALE) in self._ports:
                output = self._rescaled(name, args[0], output)
            output = self.through(name, Port.OUT, output)
            if (name, Port.CLIPPED) in self._ports and name.endswith(CLAMPED[-1]):
                self._clamps_are_next(name)
            return output

        return hook

    def _rescaled(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The LayerNorm's output with its denominator shown, and recomputed where it is edited.

        A denominator that is not edited has the gradient that it has in a computation from
        scratch: that of the quotient ``centered / scale``, which is the output.
        """
        (site,) = self._ports[name, Port.SCALE]
        with torch.no_grad():
            centered, scale = _quotient(x)

        def of_scale(gradient: torch.Tensor) -> torch.Tensor:
            return -(gradient.float() * (centered / scale) / scale).sum(-1, keepdim=True)

        if self._see(site.name, scale, output, of_scale):
            return output
        centered, scale = _quotient(x)
        seen = self._visit(site.name, self._to_hook(Layout.SAME, scale))
        rebuilt = centered / seen
        # Where the edit leaves the value alone the two quotients cancel exactly, in value and in
        # the gradient of x, and the denominator has its gradient all the same.
        kept = output + (rebuilt - centered / scale).to(x.dtype)
        return torch.where(seen == scale, kept, rebuilt.to(x.dtype))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Run the model with the taps on; afterwards it is as it was."""
        before = self._model.config._attn_implementation  # type: ignore[union-attr]
        with ExitStack() as stack:
            for name in dict.fromkeys(module for module, _ in self._ports):
                module = self._model.get_submodule(name)
                entered = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                stack.callback(entered.remove)
                stack.callback(module.register_forward_hook(self._leave(name)).remove)
            self._model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
            stack.callback(self._model.set_attn_implementation, before)  # type: ignore[arg-type]
            for name in {module for module, port in self._ports if port in _INSIDE}:
                module = self._model.get_submodule(name)
                _ATTACHED[module] = self
                stack.callback(_ATTACHED.pop, module)
            stack.callback(self.clamps_are_over)  # where the model raised between the two
            yield


def _quotient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A LayerNorm's numerator and denominator, in float32 as in the model's own kernel."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    return centered, (centered.pow(2).mean(-1, keepdim=True) + LAYER_NORM_EPS).sqrt()
