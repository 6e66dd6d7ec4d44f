"""An attention alone, called otherwise than a layer calls it: by position, or under flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.alone import Call
from conformance.compare import Gap, bitwise, compare_tensors
from conformance.edits import edited_head
from conformance.points import attach
from conformance.spec import Edit
from conformance.subjects import at_work
from conformance.tolerance import of_sum

_IN_ORDER = ("hidden_states", "position_embeddings", "attention_mask")
_KINDS = ("zero", "scale", "noise")


def by_position(call: Call) -> Call:
    """The same call, spelled as Hugging Face's signature allows."""
    named = {name: value for name, value in call.kwargs.items() if name not in _IN_ORDER}
    return Call(tuple(call.kwargs[name] for name in _IN_ORDER), named)


def without_embeddings(call: Call, rotary: Any, *, told: bool) -> tuple[Call, Call]:
    """A call that leaves cosines and sines to the attention, and one that gives them.

    Args:
        call: The call with them, and with the positions that they are of.
        rotary: Hugging Face's, which computes them.
        told: Give the positions. Else they are 0 and on.
    """
    named = dict(call.kwargs)
    embeddings = named.pop("position_embeddings")
    if not told:
        del named["position_ids"]
        hidden = named["hidden_states"]
        embeddings = rotary(hidden, torch.arange(hidden.shape[1])[None])
    return Call(kwargs=named), Call(kwargs={**named, "position_embeddings": embeddings})


@dataclass(frozen=True)
class Alone:
    """An attention of a bridge under flags, and what it is called with.

    Attributes:
        attention: The component.
        module: Hugging Face's attention.
        points: Every hook point of the bridge.
        path: The component's.
        call: The arguments. No LayerNorm precedes: of the input itself each head reads a copy.
    """

    attention: Any
    module: Any
    points: Mapping[str, HookPoint]
    path: str
    call: Call

    def gaps(self, flag: str, draw: Callable[[int], int]) -> Iterator[Gap]:
        """What is wrong of the copies that the heads read, and of what an edit of them comes to.

        Args:
            flag: ``use_split_qkv_input`` or ``use_attn_in``.
            draw: Draws whole numbers below a bound.
        """
        gates = {
            letter: f"{self.path}.hook_{'attn_in' if flag == 'use_attn_in' else f'{letter}_input'}"
            for letter in "qkv"
        }
        edits = {
            gate: Edit(site=gate, kind=_KINDS[draw(len(_KINDS))], seed=draw(2**16))
            for gate in dict.fromkeys(gates.values())
        }
        fired: Counter[str] = Counter()
        copies: dict[str, torch.Tensor] = {}
        projected: dict[str, torch.Tensor] = {}

        def edit(name: str) -> Callable[..., torch.Tensor]:
            def hook(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
                fired[name] += 1
                copies[name] = tensor.detach().clone()
                return edited_head(edits[name], tensor)

            return hook

        def look(letter: str) -> Callable[..., None]:
            def hook(tensor: torch.Tensor, hook: HookPoint) -> None:
                projected[letter] = tensor.detach().clone()

            return hook

        with ExitStack() as stack, torch.no_grad(), at_work(f"{self.path} alone, {flag}"):
            for gate in edits:
                stack.callback(attach(self.points[gate], edit(gate)))
            for letter in gates:
                point = self.points[f"{self.path}.{letter}.hook_out"]
                stack.callback(attach(point, look(letter)))
            self.attention(**self.call.kwargs)
        hidden = self.call.kwargs["hidden_states"].unsqueeze(2)
        for gate in edits:
            if fired[gate] != 1:
                yield Gap(f"{gate}, alone", "count", f"fired {fired[gate]} times instead of once")
                return
            due = hidden.expand(-1, -1, copies[gate].shape[2], -1)
            yield from bitwise(f"{gate}, alone", due, copies[gate])
        for letter, gate in gates.items():
            after = edited_head(edits[gate], copies[gate])
            yield from self._projected(letter, hidden, after, projected[letter])

    def _projected(
        self, letter: str, hidden: torch.Tensor, copies: torch.Tensor, got: torch.Tensor
    ) -> Iterator[Gap]:
        """The gap between q, k or v and the projection of what its heads read.

        Args:
            letter: Which.
            hidden: What the copies are of, ``[batch, pos, 1, d_model]``.
            copies: ``[batch, pos, copy, d_model]``. A head reads the mean of its group's.
            got: ``[batch, pos, head, d_head]``.
        """
        linear, (heads, d_head) = getattr(self.module, f"{letter}_proj"), got.shape[2:]
        weight, bias = linear.weight.detach().view(heads, d_head, -1), linear.bias
        batch, pos, _, width = copies.shape
        grouped = copies.view(batch, pos, heads, -1, width).mean(3)
        due = torch.einsum("bphm,hdm->bphd", grouped, weight)
        size = float(copies.abs().max() + hidden.abs().max()) * float(weight.abs().sum(-1).max())
        if bias is not None:
            due = due + bias.detach().view(heads, d_head)
            size += float(bias.detach().abs().max())
        site = f"{self.path}.{letter}.hook_out, alone, edited"
        gap = compare_tensors(site, due, got, of_sum(got.dtype, size))
        yield from [gap] if gap else []
