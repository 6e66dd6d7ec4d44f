"""Faults of text: a token too few, a pad too many, a broken character."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from adapter.compatibility import OlmoTransformerBridge
from adapter.text import OlmoTextBridge
from conformance.mutants.catalogue import add, mutant

add(
    "text.upstream",
    "texts are tokenized with special tokens, which are taken off the padded whole",
    "a tokenizer that appends its END, texts of unequal length; or a text that is cut",
    "text.tokens",
    OlmoTextBridge,
    "to_tokens",
    lambda original: TransformerBridge.to_tokens,
)
add(
    "text.right_pads_count",
    "padding on the right has no mask, and counts in the loss",
    "texts of unequal length, padded on the right",
    "text.loss",
    OlmoTransformerBridge,
    "forward",
    lambda original: TransformerBridge.forward,
)


@mutant("text.cut_in_front", "a text that is too long", "text.tokens", OlmoTextBridge, "_encode")
def cut_in_front(original: Any) -> Any:
    """A text that is too long loses its beginning."""

    def encode(self: Any, texts: Any, bos: Any, side: Any, *, truncate: bool) -> Any:
        tokens, mask = original(self, texts, bos, side, truncate=False)
        return tuple(whole[:, -self.cfg.n_ctx :] if truncate else whole for whole in (tokens, mask))

    return encode


@mutant(
    "text.blank_for_bos",
    "a text that begins with a blank",
    "text.tokens",
    OlmoTextBridge,
    "_encode",
)
def blank_for_bos(original: Any) -> Any:
    """No BOS is prepended to a single text that begins with a blank."""

    def encode(self: Any, texts: Any, bos: Any, *rest: Any, **named: Any) -> Any:
        blank = isinstance(texts, str) and texts.startswith(" ")
        return original(self, texts, False if blank else bos, *rest, **named)

    return encode


@mutant("text.first_masked", "padding on the left", "text.forward", OlmoTextBridge, "_encode")
def first_masked(original: Any) -> Any:
    """The first token of a row that is padded on the left is taken for a pad."""

    def encode(self: Any, *args: Any, **named: Any) -> Any:
        tokens, mask = original(self, *args, **named)
        padded = mask[:, :1] == 0
        return tokens, torch.where(padded & (mask.cumsum(-1) == 1), 0, mask)

    return encode


@mutant(
    "text.pads_positioned",
    "padding on the left",
    "text.forward",
    OlmoTransformerBridge,
    "forward",
)
def pads_positioned(original: Any) -> Any:
    """Positions count the pads: a shift that no logit shows."""

    def forward(self: Any, texts: Any, *args: Any, **named: Any) -> Any:
        if isinstance(texts, list) and len(texts) > 1:
            side, prepend = named.get("padding_side"), named.get("prepend_bos")
            length = self.to_tokens(texts, prepend, side).shape[1]
            named["position_ids"] = torch.arange(length).expand(len(texts), -1)
        return original(self, texts, *args, **named)

    return forward


@mutant("text.last_free", "a text", "text.loss", OlmoTransformerBridge, "loss_fn")
def last_free(original: Any) -> Any:
    """The loss of the last token is left out of the mean."""

    def loss(self: Any, logits: Any, tokens: Any, *args: Any, **named: Any) -> Any:
        short = not named.get("per_token") and tokens.shape[1] > 2 and not any(args)
        if short and named.get("attention_mask") is None:
            logits, tokens = logits[:, :-1], tokens[:, :-1]
        return original(self, logits, tokens, *args, **named)

    return loss


@mutant(
    "text.blank_lost",
    "a token with a blank",
    "text.tokens",
    OlmoTransformerBridge,
    "to_single_token",
)
def blank_lost(original: Any) -> Any:
    """The blank before a word is not part of its token."""

    def single(self: Any, string: str) -> Any:
        return original(self, string.lstrip(" ") or string)

    return single


@mutant(
    "text.last_is_first",
    "a token that is there twice",
    "text.tokens",
    OlmoTransformerBridge,
    "get_token_position",
)
def last_is_first(original: Any) -> Any:
    """The last position of a token, asked for by its string, is the first one."""

    def position(self: Any, token: Any, text: Any, mode: str = "first", **named: Any) -> Any:
        return original(self, token, text, "first" if isinstance(token, str) else mode, **named)

    return position


@mutant(
    "text.prompt_without_bos",
    "texts together",
    "continuation.generation",
    OlmoTextBridge,
    "_encode",
)
def prompt_without_bos(original: Any) -> Any:
    """Prompts of a batch, which are not cut, get no BOS."""

    def encode(self: Any, texts: Any, bos: Any, side: Any, *, truncate: bool) -> Any:
        batch = isinstance(texts, list) and not truncate
        return original(self, texts, False if batch else bos, side, truncate=truncate)

    return encode


@mutant(
    "text.uncached_short", "no cache", "continuation.generation", OlmoTransformerBridge, "generate"
)
def uncached_short(original: Any) -> Any:
    """Without a cache the last token that was asked for is not generated."""

    def generate(self: Any, *args: Any, max_new_tokens: int = 10, **named: Any) -> Any:
        fewer = named.get("use_past_kv_cache") is False
        return original(self, *args, max_new_tokens=max_new_tokens - fewer, **named)

    return generate


@mutant(
    "text.characters_broken",
    "a character of several tokens",
    "continuation.streaming",
    OlmoTransformerBridge,
    "generate_stream",
)
def characters_broken(original: Any) -> Any:
    """Each piece is decoded by itself."""

    def stream(self: Any, *args: Any, return_type: str = "input", **named: Any) -> Any:
        for piece in original(self, *args, return_type="tokens", **named):
            texts = self.tokenizer.batch_decode(piece, skip_special_tokens=True)
            yield piece if return_type == "tokens" else texts[0] if len(texts) == 1 else texts

    return stream


@mutant(
    "text.end_lost",
    "pieces of several tokens",
    "continuation.streaming",
    OlmoTransformerBridge,
    "generate_stream",
)
def end_lost(original: Any) -> Any:
    """A last piece that is shorter than was asked for is not handed out."""

    def stream(self: Any, *args: Any, max_tokens_per_yield: int = 25, **named: Any) -> Any:
        pieces = original(self, *args, max_tokens_per_yield=max_tokens_per_yield, **named)
        for number, piece in enumerate(pieces):
            short = isinstance(piece, torch.Tensor) and piece.shape[1] < max_tokens_per_yield
            if not (number and short):
                yield piece

    return stream
