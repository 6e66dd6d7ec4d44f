"""Observe and edit a Hugging Face model at every place of the site table, from the outside.

Module inputs and outputs are reached through PyTorch's own hooks. What happens inside attention is
reached through Hugging Face's public registries (the attention function and its mask), a `Cache`
subclass, and a `TorchFunctionMode` that sees the softmax, the dropout and the in-place clamp as
they are called. No line of the model's code is copied, and a tapped model computes bit for bit what
the bare one does, gradients included.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from conformance.sites import Layout, Port, Site

ATTENTION = "olmo_conformance"
LAYER_NORM_EPS = 1e-5  # transformers' OlmoLayerNorm.forward passes it to F.layer_norm

Visit = Callable[[str, torch.Tensor], torch.Tensor]
_ACTIVE: ContextVar[Taps | None] = ContextVar("conformance_taps", default=None)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own eager attention, with its query and key shown to the active taps."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    taps = _ACTIVE.get()
    if taps is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        query = taps.inside(layer, Port.QUERY, query)
        if not taps.cached:
            key = taps.inside(layer, Port.KEY, key)
    result: tuple[torch.Tensor, torch.Tensor | None] = eager(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class TappedCache(DynamicCache):
    """A cache that shows each new key to the active taps before it stores it."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a chunk's keys and values. Shapes ``[batch, head, pos, d_head]``."""
        taps = _ACTIVE.get()
        if taps is not None:
            key_states = taps.inside(layer_idx, Port.KEY, key_states)
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
        cached: Whether the run is given a `TappedCache`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        visit: Visit,
        *,
        d_head: int,
        clamps: bool,
        cached: bool,
    ) -> None:
        super().__init__()
        self.cached = cached
        self._model, self._visit, self._d_head = model, visit, d_head
        self._ports: dict[tuple[str, Port], list[Site]] = defaultdict(list)
        for site in sites.values():
            outward = site.port is Port.CLIPPED and not clamps
            self._ports[site.module, Port.OUT if outward else site.port].append(site)
        self._attention: str | None = None
        self._clipped: Iterator[str] = iter(())

    def through(self, module: str, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        """Show the tensor at a place to each site there, and return what they leave of it."""
        for site in self._ports.get((module, port), ()):
            # A fresh node before the visit: its gradient is that of this use alone. A clone after
            # it: what the model then does in place does not reach what was seen.
            seen = self._visit(site.name, self._to_hook(site.layout, tensor))
            tensor = self._from_hook(site.layout, seen).clone()
        return tensor

    def inside(self, layer: int, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        """Show a tensor from inside the attention of a layer."""
        return self.through(f"model.layers.{layer}.self_attn", port, tensor)

    def _to_hook(self, layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
        if layout is Layout.HEADS:
            return tensor.reshape(*tensor.shape[:-1], -1, self._d_head)
        return tensor.transpose(1, 2) if layout is Layout.SWAPPED else tensor.view_as(tensor)

    def _from_hook(self, layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
        if layout is Layout.HEADS:
            return tensor.flatten(-2)
        return tensor.transpose(1, 2) if layout is Layout.SWAPPED else tensor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Show the clamp's result, the softmax's argument and the dropout's result."""
        inside = self._attention
        assert inside is not None, "on only while an attention runs"
        if func is torch.nn.functional.softmax:
            args = (self.through(inside, Port.SCORES, args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.dropout:
            return self.through(inside, Port.PATTERN, result)
        if func is torch.Tensor.clamp_:
            # The model goes on with the tensor that it clamped, not with what clamp_ returns.
            result.copy_(self.through(next(self._clipped), Port.CLIPPED, result.clone()))
        return result

    def _off(self) -> None:
        """No more of an attention's functions are seen, whether it came to its end or raised."""
        if self._attention is not None:
            self._attention = None
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _enter(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if (name, Port.COS) in self._ports:
                # From here to the module's end, also where checkpointing computes it again: in the
                # midst of a backward, during which a mode that was on before is off.
                self._off()
                self._attention = name
                self.__enter__()  # type: ignore[no-untyped-call]
                self._clipped = (f"{name}.{letter}_proj" for letter in "qkv")
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
            if name == self._attention:
                self._off()
            if isinstance(output, tuple):
                first = self.through(name, Port.FIRST, output[0])
                second = output[1]
                if second is not None:
                    second = self.through(name, Port.SECOND, second)
                return (first, second, *output[2:])
            if (name, Port.SCALE) in self._ports:
                output = self._rescaled(name, args[0], output)
            return self.through(name, Port.OUT, output)

        return hook

    def _rescaled(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The LayerNorm's output with its denominator shown, and recomputed where it is edited.

        Where it is not, the two quotients cancel exactly, in value and in the gradient of ``x``,
        and yet the denominator has the gradient that it has in a computation from scratch.
        """
        wide = x.float()
        centered = wide - wide.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + LAYER_NORM_EPS).sqrt()
        (site,) = self._ports[name, Port.SCALE]
        seen = self._visit(site.name, self._to_hook(Layout.SAME, scale))
        rebuilt = centered / seen
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
            token = _ACTIVE.set(self)
            stack.callback(_ACTIVE.reset, token)
            stack.callback(self._off)
            yield
