"""What a model has learned, in numbers. Measured on Hugging Face's model, with no bridge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import OlmoForCausalLM

from training.corpus import VOCABULARY, random_pieces, repeated

PERIOD = 30


@contextmanager
def at_rest(model: OlmoForCausalLM) -> Iterator[None]:
    """The model in eval mode and without gradients, for a while."""
    before = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def loss(model: OlmoForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss of each next token, in nats."""
    with at_rest(model):
        return float(model(rows, labels=rows, use_cache=False).loss)


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Entropy in nats of a text's own tokens: no model that ignores the context has less loss."""
    share = torch.bincount(tokens, minlength=VOCABULARY).double() / len(tokens)
    return float(torch.special.entr(share).sum())


def clipped(model: OlmoForCausalLM, rows: torch.Tensor) -> list[dict[str, float]]:
    """For each layer, the share of the entries of q, k and v that the clamp changes."""
    clip = model.config.clip_qkv
    assert clip is not None
    shares: list[dict[str, float]] = [{} for _ in model.model.layers]
    handles = []
    for share, layer in zip(shares, model.model.layers, strict=True):
        for letter in "qkv":

            def keep(
                _: object,
                __: object,
                output: torch.Tensor,
                share: dict[str, float] = share,
                letter: str = letter,
            ) -> None:
                share[letter] = float((output.abs() > clip).float().mean())

            projection = getattr(layer.self_attn, f"{letter}_proj")
            handles.append(projection.register_forward_hook(keep))
    try:
        with at_rest(model):
            model(rows)
    finally:
        for handle in handles:
            handle.remove()
    return shares


def _twice() -> torch.Tensor:
    """Rows of random tokens that are repeated once."""
    once = random_pieces(8, PERIOD, torch.Generator().manual_seed(1))
    return repeated(once)[:, : 2 * PERIOD + 1]


def copying_loss(model: OlmoForCausalLM) -> float:
    """Mean loss on random tokens that are repeated; of the repetition only."""
    rows = _twice()
    with at_rest(model):
        logits = model(rows).logits[:, PERIOD + 1 : -1]
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, PERIOD + 2 :].flatten()))


def head_scores(model: OlmoForCausalLM) -> dict[str, list[list[float]]]:
    """How much each head of each layer looks where a known kind of head looks.

    On random tokens that are repeated once: ``previous`` is the mean attention paid to the token
    before, ``induction`` that paid, in the repetition, to the token after the earlier occurrence.
    """
    rows = _twice()
    with at_rest(model):
        patterns = model(rows, output_attentions=True).attentions
    back = {"previous": 1, "induction": PERIOD - 1}
    return {
        kind: [
            pattern[:, :, PERIOD + 1 :].diagonal(PERIOD + 1 - offset, 2, 3).mean((0, 2)).tolist()
            for pattern in patterns
        ]
        for kind, offset in back.items()
    }
