"""Texts, and what is made of them by hand.

By hand means: the tokenizer file is read by the `tokenizers` library alone, and BOS, truncation,
padding, mask, positions and labels are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conformance.compare import Gap, compare_tensors
from conformance.data import TRAINED, held_out, trained
from conformance.profiles import chosen_dtypes
from conformance.spec import Case
from conformance.strategies import cases, model_specs, on_trained
from conformance.tolerance import exactly

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
# What is rarely said: nothing; and characters of which another normalization than the tokenizer
# file's makes others, a letter and its accent, another end of line.
RARE = ("", "\ufb01 \u2460 \uff21 e\u0301\r\n")
# What the trained model goes on with: it has learned to repeat what repeats itself, bytes too.
REPEATED = "日本" * 3


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


def ids(text: str) -> list[int]:
    """A text's tokens, with nothing added."""
    found: list[int] = by_hand().encode(text, add_special_tokens=False).ids
    return found


def decoded(tokens: list[int], *, special: bool = True) -> str:
    """The text of tokens, with the special ones or without."""
    text: str = by_hand().decode(tokens, skip_special_tokens=not special)
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
        cut_left: Whether the tokenizer cuts the beginning of a text that is too long, not its end.
    """

    texts: tuple[str, ...]
    setup: str
    prepend: bool | None
    side: str | None
    own_side: str
    room: int
    cut_left: bool = False

    @property
    def left(self) -> bool:
        """Whether rows are padded on the left."""
        return (self.side or self.own_side) == "left"

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments of a call that takes text."""
        return {"prepend_bos": self.prepend, "padding_side": self.side}

    @property
    def label(self) -> str:
        """How the texts are read, as far as it may matter: for the site of a gap."""
        cut = any(len(row) > self.room for row in self.rows(truncate=False))
        ragged = len({len(row) for row in self.rows()}) > 1
        side = "left" if self.left else "right"
        bare = self.prepend is False
        beginning = [f"cut{' on the left' * self.cut_left}"] * cut
        told = beginning + [f"padded on the {side}"] * ragged + ["without BOS"] * bare
        return ", ".join([self.setup, *told])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A new tokenizer, for a bridge to set up."""
        cut = "left" if self.cut_left else "right"
        setup = TOKENIZERS[self.setup]
        made: Any = AutoTokenizer.from_pretrained(TRAINED, truncation_side=cut, **setup)
        made.padding_side = self.own_side
        return made  # type: ignore[no-any-return]

    def said(self) -> Script:
        """The same with a letter in the place of each text of no token, not even BOS."""
        texts = zip(self.texts, self.rows(), strict=True)
        return replace(self, texts=tuple(text if row else "a" for text, row in texts))

    def rows(self, *, truncate: bool = True) -> list[list[int]]:
        """The token ids of each text."""
        bos = [] if self.prepend is False else [BOS]
        rows = []
        for text in self.texts:
            said = ids(text)
            over = max(len(bos + said) - self.room, 0) if truncate else 0
            rows.append(bos + (said[over:] if self.cut_left else said[: len(said) - over]))
        return rows


def script(case: Case, *, fits: int | None = None, repeats: bool = False) -> Script:
    """The texts of a case, drawn from the seed of its tokens.

    Args:
        case: Its batch is the number of texts.
        fits: Let no text have more tokens than this; None lets some be too long for the model.
        repeats: Add `REPEATED` to every other text.
    """
    draw = Random(case.run.token_seed)
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
        while fits is not None and len(ids(text)) >= fits:
            text = text[len(text) // 2 :]
        texts.append(text or "a")
    told = Script(
        texts=tuple(texts),
        setup=draw.choice(sorted(TOKENIZERS)),
        prepend=draw.choice((None, True, False)),
        side=draw.choice((None, "left", "right")),
        own_side=draw.choice(("left", "right")),
        room=case.model.max_position_embeddings,
    )
    if fits is None:
        rare = [draw.choice(RARE) if draw.random() < 0.25 else text for text in texts]
        told = replace(told, texts=tuple(rare), cut_left=draw.random() < 0.3).said()
    return told


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


def hidden(mask: torch.Tensor, draw: Callable[[int], int]) -> torch.Tensor:
    """A mask ``[batch, pos]`` that hides a token more of the longest text, but not its last one."""
    row = int(mask.sum(1).argmax())
    (real,) = mask[row].nonzero(as_tuple=True)
    mask = mask.clone()
    if len(real) > 1:
        mask[row, real[draw(len(real) - 1)]] = 0
    return mask


def same(name: str, due: object, got: object) -> Iterator[Gap]:
    """The gap between what should have been said and what was."""
    if isinstance(due, torch.Tensor) and isinstance(got, torch.Tensor):
        gap = compare_tensors(name, due, got, exactly(due.dtype))
        yield from [gap] if gap else []
    elif due != got:
        yield Gap(name, "value", f"{got!r} instead of {due!r}")


def maskable(case: Case) -> Case:
    """A case whose rows may begin with a pad: in float64 Hugging Face makes NaN of such a one."""
    single = case.model.dtype == "float64"
    return replace(case, tokens=(), run=replace(case.run, batch=1)) if single else case
