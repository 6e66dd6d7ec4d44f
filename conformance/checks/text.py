"""Text: what a bridge makes of strings is what Hugging Face's tokenizer and model make by hand.

By hand means: the tokenizer file is read by the `tokenizers` library alone, and BOS, truncation,
padding, mask, positions and labels are written down here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conformance.checks.registry import Adapter, check
from conformance.checks.support import quiet
from conformance.compare import Gap, compare_tensors
from conformance.data import TRAINED, held_out, trained
from conformance.profiles import chosen_dtypes
from conformance.spec import Case
from conformance.strategies import cases, model_specs, on_trained
from conformance.subjects import at_work, bridged, reference
from conformance.tolerance import exactly, of_loss

BOS, PAD = 0, 1  # as in the tokenizer file: <|endoftext|>, which also ends a text, and <|padding|>
END = "<|endoftext|>"
# How the tokenizer is set up: as OLMo's own; with its END as a BOS that it prepends; and with an
# END that it appends.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prepends BOS": {"bos_token": END, "add_bos_token": True},
    "appends EOS": {"add_eos_token": True},
}
# What is added to a text: characters of many bytes, an END inside, blanks that are tokens.
SPICES = ("", "", " naïve café —", "日本", "😀", "\n\n", f" so.{END}Then", "  ")
# What the trained model goes on with: it has learned to repeat what repeats itself, bytes too.
REPEATED = "日本" * 3
ROOM_TO_GENERATE = 5


def text_cases() -> SearchStrategy[Case]:
    """Models with the tokenizer's vocabulary, drawn or trained, and a bit of room."""
    dtypes = st.sampled_from(chosen_dtypes())
    models = model_specs(rooms=st.sampled_from(range(12, 25)), dtypes=dtypes).map(
        lambda model: replace(model, vocab_size=trained().vocab_size)
    )
    half = st.sampled_from((False, True))
    return st.builds(lambda case, on: on_trained(case) if on else case, cases(models=models), half)


@cache
def by_hand() -> Tokenizer:
    """The tokenizer file, read with nothing added to it."""
    return Tokenizer.from_file(str(TRAINED / "tokenizer.json"))


def _ids(text: str) -> list[int]:
    ids: list[int] = by_hand().encode(text, add_special_tokens=False).ids
    return ids


def _decoded(ids: list[int], *, special: bool = True) -> str:
    text: str = by_hand().decode(ids, skip_special_tokens=not special)
    return text


@dataclass(frozen=True)
class Script:
    """The texts of a case, and how they are read.

    Attributes:
        texts: One for each row.
        setup: Of `TOKENIZERS`.
        prepend: Asked of the bridge; None leaves it to its default, which is to prepend.
        side: Padding side asked of the bridge; None leaves it to the tokenizer.
        own_side: Padding side of the tokenizer.
        room: Greatest number of tokens.
    """

    texts: tuple[str, ...]
    setup: str
    prepend: bool | None
    side: str | None
    own_side: str
    room: int

    @property
    def left(self) -> bool:
        """Whether rows are padded on the left."""
        return (self.side or self.own_side) == "left"

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments of a call that takes text."""
        return {"prepend_bos": self.prepend, "padding_side": self.side}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A new tokenizer, for a bridge to set up."""
        made: Any = AutoTokenizer.from_pretrained(TRAINED, **TOKENIZERS[self.setup])
        made.padding_side = self.own_side
        return made  # type: ignore[no-any-return]

    def rows(self, *, truncate: bool = True) -> list[list[int]]:
        """The token ids of each text."""
        bos = [] if self.prepend is False else [BOS]
        return [(bos + _ids(text))[: self.room if truncate else None] for text in self.texts]


def script(case: Case, *, fits: int | None = None, repeats: bool = False) -> Script:
    """The texts of a case, drawn from the seed of its tokens.

    Args:
        case: Its batch is the number of texts.
        fits: Let no text have more tokens than this; None lets some be too long for the model.
        repeats: Add `REPEATED` to every other text.
    """
    draw = Random(case.run.token_seed)
    room = case.model.max_position_embeddings
    texts = []
    for _ in range(case.run.batch):
        start = draw.randrange(len(held_out()) - 800)
        words = held_out()[start : start + 800].split(" ")
        count = draw.choice((1, 2, 3, 5, 8, 13) if fits is None else (1, 2, 3, 5))
        spice = REPEATED if repeats and draw.random() < 0.5 else draw.choice(SPICES)
        long = fits is None and draw.random() < 0.3
        text = " ".join(words[: 60 if long else count]) + spice
        if draw.random() < 0.3:
            text = f" {text}"
        while fits is not None and len(_ids(text)) >= fits:
            text = text[len(text) // 2 :]
        texts.append(text or "a")
    return Script(
        texts=tuple(texts),
        setup=draw.choice(sorted(TOKENIZERS)),
        prepend=draw.choice((None, True, False)),
        side=draw.choice((None, "left", "right")),
        own_side=draw.choice(("left", "right")),
        room=room,
    )


def padded(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask ``[batch, pos]`` of rows of unequal length."""
    longest = max(map(len, rows))
    tokens, mask = [], []
    for row in rows:
        rest = longest - len(row)
        pads, zeros, ones = [PAD] * rest, [0] * rest, [1] * len(row)
        tokens.append(pads + row if left else row + pads)
        mask.append(zeros + ones if left else ones + zeros)
    return torch.tensor(tokens), torch.tensor(mask)


def _same(name: str, due: object, got: object) -> Iterator[Gap]:
    """The gap between what should have been said and what was."""
    if isinstance(due, torch.Tensor) and isinstance(got, torch.Tensor):
        gap = compare_tensors(name, due, got, exactly(due.dtype))
        yield from [gap] if gap else []
    elif due != got:
        yield Gap(name, "value", f"{got!r} instead of {due!r}")


@check(
    "text.tokens",
    "to_tokens, to_string, to_str_tokens, to_single_token and get_token_position say what the "
    "tokenizer file says: BOS or none, padding on either side, truncation, one text or several.",
    text_cases,
    examples=0.7,
)
def tokens(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """No model is run. An END that a tokenizer appends is taken off again: a text goes on."""
    told = script(case)
    subject = bridged(case.model, adapter, tokenizer=told.tokenizer())
    bridge: Any = subject.bridge
    draw = Random(case.run.token_seed)
    truncate = draw.choice((True, False))
    rows = told.rows(truncate=truncate)
    due = padded(rows, left=told.left)[0]
    with at_work("to_tokens"):
        alone = [bridge.to_tokens(text, truncate=truncate, **told.asked) for text in told.texts]
        together = bridge.to_tokens(list(told.texts), truncate=truncate, **told.asked)
    for text, row, got in zip(told.texts, rows, alone, strict=True):
        yield from _same(f"to_tokens({text!r})", torch.tensor([row]), got)
    yield from _same(f"to_tokens({list(told.texts)!r})", due, together)
    rows = told.rows()
    strings = [[_decoded([token]) for token in row] for row in rows]
    with at_work("to_str_tokens and to_string"):
        prepend = told.prepend
        pairs = {
            "to_str_tokens(texts)": (strings, bridge.to_str_tokens(list(told.texts), prepend)),
            "to_str_tokens(text)": (strings[0], bridge.to_str_tokens(told.texts[0], prepend)),
            "to_str_tokens(tensor)": (strings[0], bridge.to_str_tokens(torch.tensor(rows[0]))),
            "to_str_tokens(row)": (strings[0], bridge.to_str_tokens(torch.tensor(rows[:1]))),
            "to_str_tokens(array)": (strings[0], bridge.to_str_tokens(np.array(rows[0]))),
            "to_string(list)": (_decoded(rows[0]), bridge.to_string(rows[0])),
            "to_string(tensor)": (_decoded(rows[-1]), bridge.to_string(torch.tensor(rows[-1]))),
            "to_string(batch)": ([_decoded(row) for row in due.tolist()], bridge.to_string(due)),
        }
    for name, (said, got) in pairs.items():
        yield from _same(name, said, got)
    yield from _positions(bridge, told, rows[0])


def _positions(bridge: Any, told: Script, row: list[int]) -> Iterator[Gap]:
    """`to_single_token` and `get_token_position` of every token of a row."""

    def said(method: str, *args: object, **named: object) -> object:
        """What a method says, or None where it refuses."""
        with at_work(method):
            try:
                return getattr(bridge, method)(*args, **named)
            except AssertionError:
                return None

    for token in dict.fromkeys(row):
        string = _decoded([token])
        single = _ids(string) == [token]
        got = said("to_single_token", string)
        yield from _same(f"to_single_token({string!r})", token if single else None, got)
        first, last = row.index(token), len(row) - 1 - row[::-1].index(token)
        given = string if single else token
        for mode, due in (("first", first), ("last", last)):
            asked = {"mode": mode, "prepend_bos": told.prepend}
            in_text = said("get_token_position", given, told.texts[0], **asked)
            in_row = said("get_token_position", token, torch.tensor([row]), mode=mode)
            yield from _same(f"get_token_position({given!r}, text, {mode!r})", due, in_text)
            yield from _same(f"get_token_position({token}, tokens, {mode!r})", due, in_row)


def _seen(case: Case) -> Case:
    """A case whose rows may begin with a pad: in float64 Hugging Face makes NaN of such a one."""
    single = case.model.dtype == "float64"
    return replace(case, tokens=(), run=replace(case.run, batch=1)) if single else case


@check(
    "text.forward",
    "Texts in, alone or together, padded on either side, give the logits, positions and patterns "
    "of Hugging Face's model on the tokens, mask and positions made by hand.",
    text_cases,
    examples=0.7,
)
def forward(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Only real tokens are compared. One text is also given as a string."""
    case = _seen(case)
    told = script(case)
    bridge: Any = bridged(case.model, adapter, tokenizer=told.tokenizer()).bridge
    truth = reference(case.model).model
    rows = told.rows()
    given, mask = padded(rows, left=told.left)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    texts = told.texts[0] if len(rows) == 1 else list(told.texts)
    with torch.no_grad():
        expected = truth(given, attention_mask=mask, position_ids=positions, output_attentions=True)
        turned = truth.model.rotary_emb(expected.logits, positions)
        with at_work("a forward of text"):
            bare = bridge(texts, **told.asked)
            logits, cache = bridge.run_with_cache(texts, **told.asked)
    pairs = {"logits": (expected.logits, bare), "logits under a cache": (expected.logits, logits)}
    for name, due in zip(("cos", "sin"), turned, strict=True):
        pairs[f"rotary_emb.hook_{name}"] = due, cache[f"rotary_emb.hook_{name}"].expand_as(due)
    for layer, pattern in enumerate(expected.attentions):
        name = f"blocks.{layer}.attn.hook_pattern"
        pairs[name] = pattern.transpose(1, 2), cache[name].transpose(1, 2)
    real = mask.bool()
    for name, (due, got) in pairs.items():
        if got.shape[: real.ndim] != real.shape:
            yield Gap(name, "shape", f"{list(got.shape)} instead of {list(due.shape)}")
            continue
        yield from _same(name, due[real], got[real])


@check(
    "text.loss",
    "The loss of texts, in all and by token, is Hugging Face's over the pairs of real tokens.",
    text_cases,
    examples=0.5,
)
def loss(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Pads have no label by hand, on whichever side they are."""
    case = _seen(case)
    told = script(case)
    bridge: Any = bridged(case.model, adapter, tokenizer=told.tokenizer()).bridge
    truth: Any = reference(case.model).model
    rows = told.rows()
    given, mask = padded(rows, left=told.left)
    pairs = (mask[:, 1:] * mask[:, :-1]).bool()
    if not bool(pairs.any()):
        return  # 0 / 0 on both sides
    labels = torch.nn.functional.pad(given[:, 1:].masked_fill(~pairs, -100), (1, 0), value=-100)
    texts = told.texts[0] if len(rows) == 1 else list(told.texts)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = truth(given, attention_mask=mask, position_ids=positions).logits
        expected = truth.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        # Bitwise: transformer_lens takes the same log-softmax, in the logits' dtype.
        chances = logits.log_softmax(-1)[:, :-1].gather(-1, given[:, 1:, None])
        with at_work("the loss of text"):
            mean = bridge(texts, return_type="loss", **told.asked)
            by_token = bridge(texts, return_type="loss", loss_per_token=True, **told.asked)
    gap = compare_tensors("loss", expected, mean.to(expected.dtype), of_loss(logits.dtype))
    yield from [gap] if gap else []
    if by_token.shape != pairs.shape:
        yield Gap("loss per token", "shape", f"{list(by_token.shape)} not {list(pairs.shape)}")
        return
    yield from _same("loss per token", -chances[..., 0][pairs], by_token[pairs])


def _continued(case: Case, told: Script, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt padded on the left, and Hugging Face's greedy continuation of it, prompt first."""
    given, mask = padded(told.rows(truncate=False), left=True)
    truth: Any = reference(case.model).model
    with torch.no_grad():
        made = truth.generate(
            given,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=BOS,
            pad_token_id=BOS,  # transformer_lens fills a finished row with its END
        )
    return given, made


def _asked(told: Script, count: int) -> dict[str, Any]:
    return {
        "max_new_tokens": count,
        "do_sample": False,
        "verbose": False,
        "prepend_bos": told.prepend,
    }


@check(
    "text.generation",
    "Texts are continued as Hugging Face's generate continues them, token for token, alone or "
    "together, with and without a cache; as strings they are decoded without special tokens.",
    text_cases,
    examples=0.5,
)
def generation(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Greedy, by the bridge's own loop and by ``hf_generate``, which adds no BOS of its own."""
    case = _seen(case)
    told = script(case, fits=case.model.max_position_embeddings - ROOM_TO_GENERATE)
    bridge: Any = bridged(case.model, adapter, tokenizer=told.tokenizer()).bridge
    texts: Any = told.texts[0] if case.run.batch == 1 else list(told.texts)
    _, made = _continued(case, told, ROOM_TO_GENERATE)
    said = [_decoded(row, special=False) for row in made.tolist()]
    asked = _asked(told, ROOM_TO_GENERATE)
    with at_work("generating from text"):
        for cached in (True, False):
            got = bridge.generate(texts, return_type="tokens", use_past_kv_cache=cached, **asked)
            yield from _same(f"tokens, use_past_kv_cache={cached}", made, got)
        yield from _same(
            "text", said[0] if len(said) == 1 else said, bridge.generate(texts, **asked)
        )
    if told.setup == "plain":
        bare = replace(told, prepend=False)
        _, made = _continued(case, bare, ROOM_TO_GENERATE)
        said = [_decoded(row, special=False) for row in made.tolist()]
        count = ROOM_TO_GENERATE
        with at_work("hf_generate from text"):
            got = bridge.hf_generate(texts, max_new_tokens=count, do_sample=False)
        yield from _same("hf_generate", said[0] if len(said) == 1 else said, got)


@check(
    "text.streaming",
    "generate_stream hands out, piece by piece, just what generate gives at once: the tokens, and "
    "the text with no character broken.",
    text_cases,
    examples=0.4,
)
def streaming(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The first piece has the prompt in it; no other is longer than was asked for."""
    case = _seen(case)
    fits = case.model.max_position_embeddings - ROOM_TO_GENERATE
    told = script(case, fits=fits, repeats=True)
    bridge: Any = bridged(case.model, adapter, tokenizer=told.tokenizer()).bridge
    texts: Any = told.texts[0] if case.run.batch == 1 else list(told.texts)
    given, made = _continued(case, told, ROOM_TO_GENERATE)
    most = 1 + case.run.token_seed % 3
    asked = {**_asked(told, ROOM_TO_GENERATE), "max_tokens_per_yield": most}
    with at_work("streaming from text"), quiet():
        pieces = list(bridge.generate_stream(texts, return_type="tokens", **asked))
        spoken = list(bridge.generate_stream(texts, return_type="str", **asked))
    yield from _same("tokens", made, torch.cat(pieces, dim=-1))
    begun = given.shape[1] + (1 if given.shape[1] >= most else most - given.shape[1])
    sizes = [piece.shape[1] for piece in pieces]
    if sizes[0] != begun or any(size > most for size in sizes[1:]):
        yield Gap("tokens", "contract", f"pieces of {sizes} tokens, at most {most} asked for")
    rows = [[piece] if isinstance(piece, str) else piece for piece in spoken]
    told_texts = ["".join(parts) for parts in zip(*rows, strict=True)]
    yield from _same("text", [_decoded(row, special=False) for row in made.tolist()], told_texts)
