"""Observe and edit a Hugging Face model at every place of the site table, from the outside.

Module inputs and outputs are reached through PyTorch's own hooks. What happens inside attention is
reached through Hugging Face's public registries (the attention function and its mask), a `Cache`
subclass, and a `TorchFunctionMode` that sees the softmax, the dropout and the in-place clamp as
they are called. That mode costs something at every call, so it is on inside the attention function,
and between the last projection and that function only where looking at what was clamped would not
do: where it is edited, or where copies may be clamped. So it is also on where checkpointing
computes a layer again, in the midst of a backward, during which a mode that was on before is off.
No line of the model's code is copied, and a tapped model computes bit for bit what
the bare one does, gradients included.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
See = Callable[[str, torch.Tensor, Turn, "torch.Tensor | None"], None]
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


def attention_of(projection: str) -> str:
    """The name of the module that a projection is part of."""
    return projection.rpartition(".")[0]


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
        copies: Whether it may be copies of these that are clamped, as in a patched model. If not,
            the outputs are looked at when attention has clamped all of them.
        see: Called instead of `visit` where nothing is edited, with a tensor of the model's own
            graph, a function that turns this tensor into the site's value, and its gradient into
            the site's, and the value if that is another: no node is added to the graph.

    Attributes:
        cached: Whether the run is given a `TappedCache`; set it before each run.
        editing: Names of the sites that `visit` is for; set it before each run. If there is no
            ``see`` these are all.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        visit: Visit,
        *,
        d_head: int,
        clamps: bool,
        copies: bool = True,
        see: See | None = None,
    ) -> None:
        super().__init__()
        self._copies = copies
        self.cached = False
        self.editing: Collection[str] = sites if see is None else ()
        self._see: See = see or _nothing
        self._model, self._visit, self._d_head = model, visit, d_head
        turns: dict[Layout, Turn] = {
            Layout.SAME: unturned,
            Layout.HEADS: lambda tensor: tensor.reshape(*tensor.shape[:-1], -1, d_head),
            Layout.SWAPPED: lambda tensor: tensor.transpose(1, 2),
        }
        self._turns = {site.name: turns[site.layout] for site in sites.values()}
        self._ports: dict[str, dict[Port, list[Site]]] = defaultdict(lambda: defaultdict(list))
        for site in sites.values():
            outward = site.port is Port.CLIPPED and not clamps
            self._ports[site.module][Port.OUT if outward else site.port].append(site)
        # The model clamps the outputs of these in place.
        self._clamped = {m for m in self._ports if clamps and m.endswith(CLAMPED)}
        # The attentions of which all clamps are followed: somebody asks what one of them leaves.
        self._followed = {
            attention_of(module) for module in self._clamped if self._ports[module][Port.CLIPPED]
        }
        self._clamped |= {f"{path}.{name}" for path in self._followed for name in CLAMPED}
        for module in (*self._followed, *self._clamped):
            self._ports[module]  # each has its hooks, whether or not it has sites of its own
        # Of the module that the latest call from inside is of.
        self._attention: dict[Port, list[Site]] = {}
        # What is about to be clamped in place, in the model's order, and the sites after the clamp.
        self._pending: list[tuple[list[Site], torch.Tensor]] = []
        self._watches_clamps = False

    def through(self, sites: Sequence[Site], tensor: torch.Tensor) -> torch.Tensor:
        """Show the tensor at a place to each site there, and return what they leave of it."""
        for site in sites:
            if site.name in self.editing:
                seen = self._visit(site.name, self._to_hook(site, tensor))
                tensor = self._from_hook(site.layout, seen)
            else:
                self._see(site.name, tensor, self._turns[site.name], None)
        return tensor

    def inside(self, layer: int, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        """Show a tensor from inside the attention of a layer, after the last clamp."""
        self._clamps_are_over()
        self._attention = self._ports[f"model.layers.{layer}.self_attn"]
        return self.through(self._attention[port], tensor)

    def _to_hook(self, site: Site, tensor: torch.Tensor) -> torch.Tensor:
        """A fresh node of the graph, which the edits of other sites at the place do not reach."""
        same = site.layout is Layout.SAME
        return tensor[...] if same else self._turns[site.name](tensor)

    def _from_hook(self, layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
        if layout is Layout.HEADS:
            return tensor.flatten(-2)
        return tensor.transpose(1, 2) if layout is Layout.SWAPPED else tensor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Show the clamp's result, the softmax's argument and the dropout's result."""
        if func is torch.nn.functional.softmax:
            args = (self.through(self._attention[Port.SCORES], args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.dropout:
            return self.through(self._attention[Port.PATTERN], result)
        if func is torch.Tensor.clamp_ and self._pending:
            sites, _ = self._pending.pop(0)
            self._clamped_in_place(sites, result)
        return result

    def _clamped_in_place(self, sites: Sequence[Site], tensor: torch.Tensor) -> None:
        """Show what the model goes on with: the tensor that it clamped, not clamp_'s result."""
        if any(site.name in self.editing for site in sites):
            tensor.copy_(self.through(sites, tensor.clone()))
        else:
            self.through(sites, tensor)

    def _before_clamps(self) -> None:
        """Watch the calls from here on, if looking at the tensors afterwards will not do."""
        after = [site.name for sites, _ in self._pending for site in sites]
        if self._copies or any(name in self.editing for name in after):
            self._watches_clamps = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def _clamps_are_over(self) -> None:
        """Show what they left, unless they were watched: what was then not seen did not happen."""
        late = [] if self._watches_clamps else list(self._pending)
        self._forget_clamps()
        for sites, tensor in late:
            self._clamped_in_place(sites, tensor)

    def _forget_clamps(self) -> None:
        """Watch no further calls until the attention function makes its own."""
        self._pending.clear()
        if self._watches_clamps:
            self._watches_clamps = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _enter(self, name: str) -> Callable[..., Any]:
        places = self._ports[name]
        into, cosine, sine = places[Port.IN], places[Port.COS], places[Port.SIN]

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if cosine or sine:
                cos, sin = kwargs["position_embeddings"]
                rotated = self.through(cosine, cos), self.through(sine, sin)
                kwargs = {**kwargs, "position_embeddings": rotated}
            tensor = args[0] if args else kwargs["hidden_states"]
            if tensor.requires_grad:
                tensor = tensor[...]  # others may read it: the gradient of this use
            tensor = self.through(into, tensor)
            return (
                ((tensor, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": tensor})
            )

        return hook

    def _leave(self, name: str) -> Callable[..., Any]:
        places = self._ports[name]
        out, first, second = places[Port.OUT], places[Port.FIRST], places[Port.SECOND]
        scale, clamped = places[Port.SCALE], name in self._clamped
        followed = clamped and attention_of(name) in self._followed
        first_of_all, last_of_all = name.endswith(CLAMPED[0]), name.endswith(CLAMPED[-1])

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                pair = (
                    self.through(sites, x)
                    for sites, x in zip((first, second), output, strict=False)
                )
                return (*pair, *output[2:])
            if scale:
                output = self._rescaled(scale[0], args[0], output)
            output = self.through(out, output)
            if clamped:
                output = output.clone()  # what the clamp then does does not reach what was seen
            if followed:
                if first_of_all:  # a forward before may have raised in the midst of them
                    self._forget_clamps()
                self._pending.append((places[Port.CLIPPED], output))
                if last_of_all:
                    self._before_clamps()
            return output

        return hook

    def _rescaled(self, site: Site, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The LayerNorm's output with its denominator shown, and recomputed where it is edited.

        A denominator that is not edited has the gradient that it has in a computation from
        scratch: that of the quotient ``centered / scale``, which is the output.
        """
        edited = site.name in self.editing
        wide = (x if edited else x.detach()).float()
        centered = wide - wide.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + LAYER_NORM_EPS).sqrt()
        if not edited:

            def of_scale(gradient: torch.Tensor) -> torch.Tensor:
                # In the order in which autograd takes the derivative of a quotient.
                return (-gradient.float() * (centered / scale / scale)).sum(-1, keepdim=True)

            self._see(site.name, output, of_scale, scale)
            return output
        seen = self._visit(site.name, self._to_hook(site, scale))
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
            for name, places in self._ports.items():
                module = self._model.get_submodule(name)
                entered = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                stack.callback(entered.remove)
                stack.callback(module.register_forward_hook(self._leave(name)).remove)
                if name in self._followed or any(places[port] for port in _INSIDE):
                    _ATTACHED[module] = self
                    stack.callback(_ATTACHED.pop, module)
            self._model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
            stack.callback(self._model.set_attn_implementation, before)  # type: ignore[arg-type]
            stack.callback(self._forget_clamps)  # where the model raised in the midst of them
            yield


def unturned(tensor: torch.Tensor) -> torch.Tensor:
    """The `Turn` of a tensor that is in the hook's layout already."""
    return tensor


def _nothing(*_: object) -> None:
    """There is nobody to see."""
