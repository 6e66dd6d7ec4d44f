"""Call one module with drawn inputs, on its own, and keep what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformers import DynamicCache

from conformance.spec import Case

Tensors = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Call:
    """What a module is called with.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Drawer:
    """The random inputs of a case's modules, the same for whoever asks in the same order."""

    def __init__(self, case: Case) -> None:
        self.run, self.model = case.run, case.model
        self.dtype: torch.dtype = getattr(torch, case.model.dtype)
        self._draw = torch.Generator().manual_seed(case.run.token_seed)

    def hidden(self, width: int) -> torch.Tensor:
        """``[batch, pos, width]``; not centered, so that a LayerNorm has something to do."""
        shape = (self.run.batch, self.run.seq_len, width)
        return (torch.randn(shape, generator=self._draw) + 0.5).to(self.dtype)

    def tokens(self) -> torch.Tensor:
        """``[batch, pos]``."""
        shape = (self.run.batch, self.run.seq_len)
        return torch.randint(0, self.model.vocab_size, shape, generator=self._draw)

    def positions(self) -> torch.Tensor:
        """``[batch, pos]``, from anywhere that the model has room."""
        room = self.model.max_position_embeddings - self.run.seq_len + 1
        start = torch.randint(0, room, (self.run.batch, 1), generator=self._draw)
        return start + torch.arange(self.run.seq_len)

    def seen(self) -> torch.Tensor:
        """Which keys a query sees, ``[batch, 1, query, key]``: earlier ones, and always its own."""
        shape = (self.run.batch, 1, self.run.seq_len, self.run.seq_len)
        kept = torch.rand(shape, generator=self._draw) < 0.7
        return (kept | torch.eye(self.run.seq_len, dtype=torch.bool)).tril()


def _own(value: Any) -> Any:
    """A copy of an argument that has a gradient of its own."""
    if isinstance(value, tuple):
        return tuple(_own(each) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _leaves(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating point tensors of an argument, but for masks, which are constants."""
    if isinstance(value, tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, f"{name}[{index}]")
    elif isinstance(value, torch.Tensor) and value.requires_grad and name != "attention_mask":
        yield name, value


def run_alone(
    module: Callable[..., Any],
    calls: Sequence[Call],
    parameters: Mapping[str, nn.Parameter],
    *,
    seed: int,
    cached: bool = False,
) -> Tensors:
    """Call a module once or more, send a probe back, and keep outputs and gradients.

    Args:
        module: What to call.
        calls: The arguments, of which it gets copies.
        parameters: Those whose gradients are kept, by any names.
        seed: Of the random state of the forwards, and of the probe.
        cached: Give all calls one fresh key-value cache, and keep what is in it at the end.
    """
    found: dict[str, torch.Tensor | None] = {}
    leaves: dict[str, torch.Tensor] = dict(parameters)
    cache = DynamicCache() if cached else None
    extra = {} if cache is None else {"past_key_values": cache}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # manual_seed() itself takes 2 ms
        for turn, call in enumerate(calls):
            args, kwargs = _own(call.args), {name: _own(v) for name, v in call.kwargs.items()}
            named = {**{str(index): each for index, each in enumerate(args)}, **kwargs}
            for name, value in named.items():
                leaves |= {f"{leaf} of call {turn}": t for leaf, t in _leaves(value, name)}
            output = module(*args, **kwargs, **extra)
            several = output if isinstance(output, tuple) else (output,)
            found |= {f"output {index} of call {turn}": each for index, each in enumerate(several)}
    if cache is not None:
        kept: Any = cache.layers[-1]
        found |= {"cached keys": kept.keys, "cached values": kept.values}
    sent = [each for each in found.values() if each is not None and each.requires_grad]
    if sent:
        draw = torch.Generator().manual_seed(seed)
        probes = [torch.randn(each.shape, generator=draw).to(each.dtype) for each in sent]
        gradients = torch.autograd.grad(sent, list(leaves.values()), probes, allow_unused=True)
        found |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {name: None if each is None else each.detach() for name, each in found.items()}


@contextmanager
def watched(points: Mapping[str, HookPoint]) -> Iterator[None]:
    """With a forward and a backward hook that only look on each hook point."""
    try:
        for point in points.values():
            point.add_hook(lambda tensor, hook: None)
            point.add_hook(lambda tensor, hook: None, dir="bwd")
        yield
    finally:
        for point in points.values():
            point.remove_hooks("both")
