"""Texts continued: generated at once and streamed, as Hugging Face's generate does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from conformance.checks.registry import Adapter, check
from conformance.checks.script import (
    BOS,
    END,
    Script,
    decoded,
    hidden,
    maskable,
    padded,
    same,
    script,
    text_cases,
)
from conformance.checks.support import drawing, quiet
from conformance.compare import Gap
from conformance.spec import Case
from conformance.subjects import at_work, bridged, reference

ROOM_TO_GENERATE = 5


def _told(case: Case, *, repeats: bool = False) -> tuple[Script, Any]:
    """Texts with room to go on, some of which begin with what pads others, and their tokenizer."""
    fits = case.model.max_position_embeddings - ROOM_TO_GENERATE - 1
    told, draw = script(case, fits=fits, repeats=repeats), drawing(case)
    tokenizer: Any = told.tokenizer()
    if draw(2):
        tokenizer.pad_token = END
    pad = tokenizer.pad_token
    texts = tuple(pad + text if draw(2) else text for text in told.texts)
    return replace(told, texts=texts), tokenizer


def _continued(
    case: Case, told: Script, tokenizer: Any, count: int, **otherwise: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt padded on the left, and Hugging Face's greedy continuation of it, prompt first."""
    given, mask = padded(told.rows(truncate=False), left=True)
    given = given.masked_fill(mask == 0, tokenizer.pad_token_id)
    truth: Any = reference(case.model).model
    asked: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": count,
        "do_sample": False,
        "eos_token_id": BOS,
        "pad_token_id": BOS,  # transformer_lens fills a finished row with its END
        **otherwise,
    }
    with torch.no_grad():
        made = truth.generate(given, **asked)
    return given, made


def _asked(told: Script, count: int) -> dict[str, Any]:
    return {
        "max_new_tokens": count,
        "do_sample": False,
        "verbose": False,
        "prepend_bos": told.prepend,
    }


@check(
    "continuation.generation",
    "Texts are continued as Hugging Face's generate continues them, token for token, alone or "
    "together, with and without a cache, under a mask that is given, up to the ends of text that "
    "hf_generate is given; as strings they are decoded without special tokens.",
    text_cases,
    examples=0.3,
)
def generation(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Greedy, by the bridge's own loop and by ``hf_generate``, which adds no BOS of its own."""
    case = maskable(case)
    told, tokenizer = _told(case)
    bridge: Any = bridged(case.model, adapter, tokenizer=tokenizer).bridge
    texts: Any = told.texts[0] if case.run.batch == 1 else list(told.texts)
    _, made = _continued(case, told, tokenizer, ROOM_TO_GENERATE)
    said = [decoded(row, special=False) for row in made.tolist()]
    asked = _asked(told, ROOM_TO_GENERATE)
    for cached in (True, False):
        # Each as Hugging Face rounds it: a token may hang on the last bit of a short dtype.
        _, due = _continued(case, told, tokenizer, ROOM_TO_GENERATE, use_cache=cached)
        with at_work("generating from text"):
            got = bridge.generate(texts, return_type="tokens", use_past_kv_cache=cached, **asked)
        yield from same(f"tokens, use_past_kv_cache={cached}", due, got)
    with at_work("generating from text"):
        got = bridge.generate(texts, **asked)
    yield from same("text", said[0] if len(said) == 1 else said, got)
    draw = drawing(case)
    if case.run.batch > 1 and draw(4):
        mask = hidden(padded(told.rows(truncate=False), left=True)[1], draw)
        _, made = _continued(case, told, tokenizer, ROOM_TO_GENERATE, attention_mask=mask)
        with at_work("generating from text under a mask"):
            got = bridge.generate(texts, return_type="tokens", attention_mask=mask, **asked)
        yield from same("tokens under a mask", made, got)
    if told.setup == "plain":
        bare, ends = replace(told, prepend=False), {}
        _, made = _continued(case, bare, tokenizer, ROOM_TO_GENERATE)
        if draw(4):
            ends["eos_token_id"] = int(made[0, draw(ROOM_TO_GENERATE) - ROOM_TO_GENERATE])
            _, made = _continued(case, bare, tokenizer, ROOM_TO_GENERATE, **ends)
        said = [decoded(row, special=False) for row in made.tolist()]
        count = ROOM_TO_GENERATE
        with at_work("hf_generate from text"):
            got = bridge.hf_generate(texts, max_new_tokens=count, do_sample=False, **ends)
        yield from same("hf_generate", said[0] if len(said) == 1 else said, got)


@check(
    "continuation.streaming",
    "generate_stream hands out, piece by piece, just what generate gives at once: the tokens, and "
    "the text with no character broken.",
    text_cases,
    examples=0.25,
)
def streaming(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The first piece has the prompt in it; no other is longer than was asked for."""
    case = maskable(case)
    told, tokenizer = _told(case, repeats=True)
    bridge: Any = bridged(case.model, adapter, tokenizer=tokenizer).bridge
    texts: Any = told.texts[0] if case.run.batch == 1 else list(told.texts)
    given, made = _continued(case, told, tokenizer, ROOM_TO_GENERATE)
    most = 1 + case.run.token_seed % 3
    asked = {**_asked(told, ROOM_TO_GENERATE), "max_tokens_per_yield": most}
    with at_work("streaming from text"), quiet():
        pieces = list(bridge.generate_stream(texts, return_type="tokens", **asked))
        spoken = list(bridge.generate_stream(texts, return_type="str", **asked))
    yield from same("tokens", made, torch.cat(pieces, dim=-1))
    begun = given.shape[1] + (1 if given.shape[1] >= most else most - given.shape[1])
    sizes = [piece.shape[1] for piece in pieces]
    if sizes[0] != begun or any(size > most for size in sizes[1:]):
        yield Gap("tokens", "contract", f"pieces of {sizes} tokens, at most {most} asked for")
    rows = [[piece] if isinstance(piece, str) else piece for piece in spoken]
    told_texts = ["".join(parts) for parts in zip(*rows, strict=True)]
    yield from same("text", [decoded(row, special=False) for row in made.tolist()], told_texts)
