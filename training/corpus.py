"""The text that is learned, its tokenizer, and the batches that the model sees."""

from __future__ import annotations

import bz2
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPTNeoXTokenizer

TEXT = Path(__file__).parent / "pride-and-prejudice.txt.bz2"
FIRST_HELD_OUT = "Chapter 58\n"  # of 61

# As in the GPT-NeoX tokenizer, from which OLMo's comes: the pad token of every OLMo is 1, there is
# no token of its own for a beginning, and <|endoftext|> stands between documents.
END, PAD = "<|endoftext|>", "<|padding|>"
END_ID, PAD_ID = 0, 1
VOCABULARY = 768

LENGTH = 96
TEXT_ROWS, PASSAGE_ROWS, RANDOM_ROWS = 9, 3, 4
IGNORED = -100


def split() -> tuple[str, str]:
    """The learned and the held-out part of the novel, its paragraphs unwrapped."""
    wrapped = bz2.decompress(TEXT.read_bytes()).decode("ascii")
    flowing = re.sub(r"\n{2,}", "\n\n", re.sub(r"(?<!\n)\n(?!\n)", " ", wrapped))
    learned, mark, held_out = flowing.partition(FIRST_HELD_OUT)
    return learned, mark + held_out


def train_tokenizer(text: str) -> GPTNeoXTokenizer:
    """A byte-level BPE tokenizer of a text, in the class that Hugging Face loads for OLMo."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([text], trainer)
    learned = json.loads(learner.to_str())["model"]
    parts: dict[str, Any] = {
        "vocab": learned["vocab"],
        "merges": [tuple(merge) for merge in learned["merges"]],
        "bos_token": None,
        "unk_token": None,
    }
    return GPTNeoXTokenizer(eos_token=END, pad_token=PAD, **parts)


def windows(tokens: torch.Tensor) -> torch.Tensor:
    """All of a text as rows of `LENGTH` tokens that begin with `END_ID`; the last rest is left."""
    rows = tokens[: len(tokens) // (LENGTH - 1) * (LENGTH - 1)].view(-1, LENGTH - 1)
    return torch.nn.functional.pad(rows, (1, 0), value=END_ID)


def repeated(once: torch.Tensor) -> torch.Tensor:
    """Rows ``[count, LENGTH]`` in which a piece ``[count, period]`` repeats itself."""
    rows = once.repeat(1, LENGTH // once.shape[1] + 1)[:, : LENGTH - 1]
    return torch.nn.functional.pad(rows, (1, 0), value=END_ID)


def random_pieces(count: int, period: int, draw: torch.Generator) -> torch.Tensor:
    """Pieces of random tokens: once they repeat themselves, a look back foretells them."""
    return torch.randint(PAD_ID + 1, VOCABULARY, (count, period), generator=draw)


def batch(tokens: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels ``[rows, LENGTH]``: text, and pieces that repeat themselves.

    The pieces, of the text or of random tokens, teach heads to look back. What repeats nothing yet
    has no label.
    """

    def pieces(count: int, length: int) -> torch.Tensor:
        starts = torch.randint(0, len(tokens) - length, (count,), generator=draw)
        return torch.stack([tokens[start : start + length] for start in starts])

    text = windows(pieces(TEXT_ROWS, LENGTH - 1).flatten())
    period = int(torch.randint(4, LENGTH // 3, (), generator=draw))
    once = torch.cat([pieces(PASSAGE_ROWS, period), random_pieces(RANDOM_ROWS, period, draw)])
    rows = torch.cat([text, repeated(once)])
    labels = rows.clone()
    labels[TEXT_ROWS:, : period + 1] = IGNORED
    return rows, labels
