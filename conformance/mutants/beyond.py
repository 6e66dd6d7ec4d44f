"""Faults of long inputs and far positions, of a second backward, and of Hugging Face's records."""

from __future__ import annotations

from typing import Any

import torch

from adapter import attention
from adapter.rotary import OlmoRotaryEmbeddingBridge
from conformance.mutants.catalogue import add, bridge_mutant, hook_mutant, mutant

WINDOW = 24


@mutant("beyond.window", "more than 24 tokens", "forward.long", attention, "softmax")
def window(original: Any) -> Any:
    """A query sees its last 24 keys only."""

    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        queries, keys = scores.shape[-2:]
        seen = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries - WINDOW + 1)
        hidden = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        out: torch.Tensor = original(hidden if keys > WINDOW else scores, dim=dim, dtype=dtype)
        return out

    return softmax


def _at_positions(change: Any) -> Any:
    def make(original: Any) -> Any:
        def forward(self: Any, x: Any, position_ids: Any, *args: Any, **named: Any) -> Any:
            return original(self, x, change(self, position_ids), *args, **named)

        return forward

    return make


def _clamped(self: Any, positions: torch.Tensor) -> torch.Tensor:
    room = self.original_component.config.max_position_embeddings
    return positions.clamp(max=room - 1)


for name, breaks, trigger, change in (
    (
        "table",
        "positions beyond max_position_embeddings are its last one",
        "a position beyond",
        _clamped,
    ),
    (
        "short_positions",
        "positions are rounded to bfloat16",
        "a position beyond 256",
        lambda self, positions: positions.bfloat16().long(),
    ),
):
    make, owner = _at_positions(change), OlmoRotaryEmbeddingBridge
    add(f"beyond.{name}", breaks, trigger, "forward.long", owner, "forward", make)


def _weaker_again(original: Any, tensor: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = original(tensor)
    calls: list[int] = []

    def fade(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient if len(calls) == 1 else gradient / 2

    if out.requires_grad:
        out = out.view_as(out)
        out.register_hook(fade)  # type: ignore[no-untyped-call]
    return out


_LATEST: dict[str, torch.Size] = {}


def _of_the_latest(original: Any, tensor: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = original(tensor)
    _LATEST["shape"] = out.shape
    if out.requires_grad:
        out = out.view_as(out)
        out.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradient if _LATEST["shape"] == gradient.shape else gradient / 2
        )
    return out


for name, breaks, trigger, call in (
    ("second_backward", "a second backward halves the gradient", "any", _weaker_again),
    (
        "latest_forward",
        "a gradient is halved if another forward has come since its own",
        "more than one token",
        _of_the_latest,
    ),
):
    hook_mutant(
        f"again.{name}", breaks, trigger, "gradients.twice", "blocks.{i}.mlp.hook_out", call
    )


def _recorded(bridge: Any, change: Any) -> None:
    def after(module: Any, args: Any, output: Any) -> Any:
        if getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = change(output["hidden_states"])
        return output

    bridge.original_model.register_forward_hook(after)


@bridge_mutant("alive.hidden_states_detached", "a gradient of them", "alive.hidden_states")
def detached(bridge: Any) -> None:
    """The recorded hidden states have no gradient."""
    _recorded(bridge, lambda states: tuple(state.detach() for state in states))


@bridge_mutant("alive.hidden_states_shifted", "any", "alive.hidden_states")
def shifted(bridge: Any) -> None:
    """The recorded hidden states begin behind the first block, and the last is there twice."""
    _recorded(bridge, lambda states: (*states[1:], states[-1]))
