"""Faults that show in one way of saying a call, and in no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import add, mutant

Arguments = tuple[Any, ...]
Options = dict[str, Any]


def _said_otherwise(change: Callable[[Arguments, Options], Arguments]) -> Any:
    """A bridge's call takes its arguments, behind the input, as ``change`` leaves them."""

    def make(original: Any) -> Any:
        def call(self: Any, input: Any = None, *args: Any, **named: Any) -> Any:
            if input is not None:
                named["input"] = input
            args = change(args, named)
            return original(self, named.pop("input", None), *args, **named)

        return call

    return make


def _counted(args: Arguments, named: Options) -> Arguments:
    embeddings = named.get("input")
    if isinstance(embeddings, torch.Tensor) and embeddings.is_floating_point() and len(args) > 4:
        named.setdefault("position_ids", torch.arange(embeddings.shape[1])[None])
    return args


def _no_older_mask(args: Arguments, named: Options) -> Arguments:
    named.pop("one_zero_attention_mask", None)
    return args


def _no_older_flag(args: Arguments, named: Options) -> Arguments:
    named.pop("use_past_kv_cache", None)
    return args


def _in_all(args: Arguments, named: Options) -> Arguments:
    return (args[0], False, *args[2:]) if len(args) > 1 else args


def _logits_only(args: Arguments, named: Options) -> Arguments:
    return args[:4]


for name, breaks, trigger, method, change in (
    (
        "mask_by_position",
        "the positions of embeddings do not follow a mask that is given by position",
        "embeddings, a gap or padding on the left",
        "forward",
        _counted,
    ),
    (
        "older_mask",
        "one_zero_attention_mask is passed over",
        "a gap or padding on the left",
        "forward",
        _no_older_mask,
    ),
    ("older_flag", "use_past_kv_cache=True asks for nothing", "any", "forward", _no_older_flag),
    (
        "per_token_by_position",
        "loss_per_token is passed over where it is given by position",
        "a loss of each token",
        "forward",
        _in_all,
    ),
    (
        "type_by_position",
        "run_with_hooks gives logits, whatever return_type is asked for by position",
        "a loss or nothing",
        "run_with_hooks",
        _logits_only,
    ),
):
    make = _said_otherwise(change)
    owner = OlmoTransformerBridge
    add(f"spelled.{name}", breaks, trigger, "calls.spelled", owner, method, make)


@mutant("spelled.loss_fn", "a mask", "calls.spelled", OlmoTransformerBridge, "loss_fn")
def loss_fn(original: Any) -> Any:
    """Loss_fn counts padding where it is given its mask by position."""

    def loss(
        self: Any,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        *by_position: Any,
        attention_mask: torch.Tensor | None = None,
        per_token: bool = False,
    ) -> Any:
        per_token = by_position[1] if by_position[1:] else per_token
        return original(self, logits, tokens, attention_mask=attention_mask, per_token=per_token)

    return loss


@mutant(
    "spelled.every_query",
    "a mask of every query",
    "calls.spelled",
    OlmoTransformerBridge,
    "_prepare_loss_attention_mask",
)
def every_query(original: Any) -> Any:
    """The loss counts padding under a four-dimensional mask."""

    def prepare(self: Any, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = original(self, mask, tokens)
        return flat if mask.ndim == 2 else torch.ones_like(flat)

    return prepare
