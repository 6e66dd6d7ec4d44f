"""Faults of the ways to call a forward, and of what it returns."""

from __future__ import annotations

from typing import Any

import torch

from adapter import attention, calls
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import PAD_TOKEN, Make, add, mutant


def _before_forward(change: Any) -> Make:
    """A bridge's forward whose input and keywords are changed first."""

    def make(original: Any) -> Any:
        def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
            return original(self, change(input, named), *args, **named)

        return forward

    return make


def _first_cut_off(input: Any, named: dict[str, Any]) -> Any:
    if input is None or not input.is_floating_point():
        return input
    return torch.cat([input[:, :1].detach(), input[:, 1:]], dim=1)


def _as_batch(input: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
    if input.ndim > 1:
        return input
    for name in ("attention_mask", "position_ids"):
        if named.get(name) is not None:
            named[name] = named[name].T
    return input[:, None]


def _boolean_in_order(input: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
    mask = named.get("attention_mask")
    if mask is not None and mask.dtype is torch.bool and mask.ndim == 2:
        named.setdefault("position_ids", torch.arange(input.shape[1])[None])
    return input


def _pads_masked(input: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
    if not input.is_floating_point() and named.get("attention_mask") is None:
        real = input.ne(PAD_TOKEN)
        real[..., -1] = True
        named["attention_mask"] = real.long().reshape(-1, real.shape[-1])
    return input


for name, breaks, trigger, killer, change in (
    (
        "embeddings_cut_off",
        "no gradient reaches the embeddings of the first position",
        "any",
        "calls.embeddings",
        _first_cut_off,
    ),
    (
        "row_as_batch",
        "a row of tokens without a batch is taken for a batch of single tokens",
        "two tokens",
        "calls.tokens",
        _as_batch,
    ),
    (
        "pads_masked",
        "a pad token inside a text is taken for padding, and masked",
        "two tokens, no mask",
        "calls.tokens",
        _pads_masked,
    ),
    (
        "boolean_in_order",
        "a boolean mask moves no position",
        "a gap inside a row, or left padding",
        "calls.masks",
        _boolean_in_order,
    ),
):
    make = _before_forward(change)
    add(f"calls.{name}", breaks, trigger, killer, OlmoTransformerBridge, "forward", make)

add(
    "calls.embeddings_in_order",
    "embeddings have the positions 0, 1, 2, whatever the mask says: transformer_lens' own",
    "a gap inside a row",
    "calls.embeddings",
    calls,
    "_positions",
    lambda original: lambda mask, length: None,
)


@mutant(
    "calls.boolean_added",
    "any",
    "calls.masks",
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
)
def boolean_added(original: Any) -> Any:
    """A boolean mask is added to the scores as 0 and 1, as Hugging Face's eager attention does."""

    def masked(self: Any, scores: torch.Tensor, mask: Any, *sizes: int) -> Any:
        added = mask.to(scores.dtype) if mask is not None and mask.dtype is torch.bool else mask
        return original(self, scores, added, *sizes)

    return masked


@mutant(
    "calls.no_mask_no_cause",
    "a model loaded with sdpa, no padding, two tokens",
    "calls.sdpa",
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
)
def no_mask_no_cause(original: Any) -> Any:
    """Where Hugging Face hands no mask to attention, a query sees the keys after it."""

    def masked(self: Any, scores: torch.Tensor, mask: Any, *sizes: int) -> Any:
        return scores if mask is None else original(self, scores, mask, *sizes)

    return masked


add(
    "calls.sharper",
    "scores are too large by a thousandth",
    "two tokens",
    "calls.sdpa_reference",
    attention,
    "softmax",
    lambda original: lambda scores, dim, dtype: original(scores * 1.001, dim=dim, dtype=dtype),
)


@mutant("returns.mask_lost", "padding", "returns.kinds", OlmoTransformerBridge, "loss_fn")
def mask_lost(original: Any) -> Any:
    """The loss per token is of padding too."""

    def loss(self: Any, logits: Any, tokens: Any, attention_mask: Any, per_token: bool) -> Any:
        mask = None if per_token else attention_mask
        return original(self, logits, tokens, mask, per_token)

    return loss


@mutant(
    "returns.mean_of_all",
    "labels of -100",
    "returns.kinds",
    OlmoTransformerBridge,
    "_causal_labels_loss",
)
def mean_of_all(original: Any) -> Any:
    """The loss of labels is divided by the number of all pairs."""

    def loss(self: Any, logits: Any, labels: Any, attention_mask: Any, per_token: bool) -> Any:
        each = original(self, logits, labels, attention_mask=attention_mask, per_token=True)
        return each if per_token else each.mean()

    return loss


@mutant("returns.steeper", "any", "returns.labels", OlmoTransformerBridge, "loss_fn")
def steeper(original: Any) -> Any:
    """The gradient of the loss is too large by a hundredth."""

    def loss(self: Any, *args: Any, **named: Any) -> torch.Tensor:
        found = original(self, *args, **named)
        return with_gradient_of(found, found * 1.01)

    return loss
