"""Text in: the tokens, the mask and the loss of strings are the tokenizer's own."""

from __future__ import annotations

from collections.abc import Callable
from inspect import BoundArguments, signature
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

_CACHE = 5  # where past_key_values stands behind the mask, in a call by position


class OlmoTextBridge(TransformerBridge):
    """A TransformerBridge whose texts are tokenized one by one, and whose pads never count.

    TransformerLens lets the tokenizer add its special tokens and takes them off the padded whole
    again. So an END that the tokenizer appends stays in all rows but the longest, one that the text
    itself ends with is lost, and truncation makes room for what is then taken off. Padding on the
    right gets no mask, and counts in the loss; over a cache, what masks padding on the left is
    taken for the mask of the cache's own slots. What generates takes every pad token in front of a
    text for padding.
    """

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> torch.Tensor:
        """Convert texts to tokens ``[batch, pos]``; see `TransformerBridge.to_tokens`."""
        tokens, _ = self._encode(input, prepend_bos, padding_side, truncate=truncate)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: torch.Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """Run the model, on texts too; see `TransformerBridge.forward`."""
        masked = attention_mask is not None or named.get("one_zero_attention_mask") is not None
        if isinstance(input, list) and len(input) > 1 and not masked:
            tokens, mask = self._encode(input, prepend_bos, padding_side, truncate=True)
            input = tokens.to(self.cfg.device)
            # Where nothing is padded there is nothing to mask.
            if not bool(mask.all()):
                cache = rest[_CACHE] if len(rest) > _CACHE else named.get("past_key_values")
                attention_mask = _behind(cache, mask).to(self.cfg.device)
        return super().forward(
            input,
            return_type,
            loss_per_token,
            prepend_bos,
            padding_side,
            attention_mask,
            *rest,
            **named,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Go on with tokens or texts; see `TransformerBridge.generate`."""
        given = self._masked_prompt(super().generate, *args, **kwargs)
        return super().generate(*given.args, **given.kwargs)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Any:
        """Go on piece by piece; see `TransformerBridge.generate_stream`."""
        given = self._masked_prompt(super().generate_stream, *args, **kwargs)
        return super().generate_stream(*given.args, **given.kwargs)

    def _masked_prompt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> BoundArguments:
        """The arguments of a call that generates: for several texts, with a mask ``[batch, pos]``.

        A mask of ones, too: without any, pads are looked for.
        """
        asked = signature(call)
        given = asked.bind(*args, **kwargs)
        named: dict[str, Any] = given.arguments
        texts: Any = named.get("input")
        several = isinstance(texts, list) and len(texts) > 1
        # TransformerLens before 4.2 cannot be told a mask for streaming.
        tells = "attention_mask" in asked.parameters and named.get("attention_mask") is None
        if several and tells:
            _, mask = self._encode(texts, named.get("prepend_bos"), "left", truncate=False)
            named["attention_mask"] = mask
        return given

    def _encode(
        self,
        texts: str | list[str],
        prepend_bos: bool | None,
        padding_side: str | None,
        *,
        truncate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask ``[batch, pos]`` of texts."""
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            raise ValueError("this bridge has no tokenizer: give it one, or tokens instead of text")
        if prepend_bos is None:
            prepend_bos = self.cfg.default_prepend_bos
        first = (
            [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
        )
        room = self.cfg.n_ctx - len(first)
        texts = [texts] if isinstance(texts, str) else texts
        rows = []
        for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            over = max(len(row) - room, 0) if truncate else 0
            start = over if tokenizer.truncation_side == "left" else 0
            kept = first + row[start : start + len(row) - over]
            rows.append(torch.tensor(kept, dtype=torch.long))
        longest = max(len(row) for row in rows)
        tokens = torch.full((len(rows), longest), tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(tokens)
        left = (padding_side or tokenizer.padding_side) == "left"
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            tokens[index, place], mask[index, place] = row, 1
        return tokens, mask


def _behind(cache: Any, mask: torch.Tensor) -> torch.Tensor:
    """A mask of new tokens with the slots of a cache in front, ``[batch, cached + pos]``."""
    cached = 0 if cache is None else int(cache.get_seq_length())
    return torch.cat([mask.new_ones(len(mask), cached), mask], dim=1)
