"""Texts become the tokenizer's tokens, and pads never count."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPTNeoXTokenizer, PreTrainedTokenizerFast

import adapter
from adapter.tests import models
from adapter.tests.models import same

END = "<|endoftext|>"
TEXTS = ["ab", " abc", "b"]
BYTES = [END, "<|padding|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
A, B, C, BLANK = (BYTES.index(letter) for letter in ("a", "b", "c", "Ġ"))


def tokenizer(**setup: Any) -> Any:
    vocabulary = {token: number for number, token in enumerate(BYTES)}
    names: dict[str, Any] = {"bos_token": None, "unk_token": None, "eos_token": END}
    return GPTNeoXTokenizer(vocab=vocabulary, merges=[], **names | setup)


def bridged(**setup: Any) -> Any:
    room: dict[str, Any] = {"max_position_embeddings": 6, "vocab_size": len(BYTES)}
    return adapter.bridge(models.olmo(**room), tokenizer(**setup))


@pytest.mark.parametrize("setup", [{}, {"add_eos_token": True}], ids=["plain", "appends"])
def test_tokens(setup: Any) -> None:
    bridge = bridged(**setup)
    right = [[0, A, B, 1, 1], [0, BLANK, A, B, C], [0, B, 1, 1, 1]]
    assert bridge.to_tokens(TEXTS).tolist() == right
    left = [[1, 1, A, B], [BLANK, A, B, C], [1, 1, 1, B]]
    assert bridge.to_tokens(TEXTS, prepend_bos=False, padding_side="left").tolist() == left
    assert bridge.to_tokens(f"a{END}", prepend_bos=False).tolist() == [[A, 0]]
    assert bridge.to_tokens("abc" * 3).tolist() == [[0, A, B, C, A, B]]
    assert bridge.to_tokens("abc" * 3, truncate=False).shape == (1, 10)
    empty = bridge.to_tokens("", prepend_bos=False)
    assert (empty.shape, empty.dtype) == ((1, 0), torch.long)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_count_nowhere(side: str) -> None:
    bridge = bridged()
    together = bridge(TEXTS, return_type="loss", loss_per_token=True, padding_side=side)
    alone = [bridge(text, return_type="loss", loss_per_token=True)[0] for text in TEXTS]
    mean = bridge(TEXTS, return_type="loss", padding_side=side)
    assert torch.allclose(mean, torch.cat(alone).mean())
    for row, due in zip(together, alone, strict=True):
        got = row[-len(due) :] if side == "left" else row[: len(due)]
        assert torch.allclose(got, due)


def test_texts_of_one_length_get_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, twin = bridged(), bridged()
    plain, given = bridge._driver.forward, []

    def forward(**named: Any) -> Any:
        given.append(named)
        return plain(**named)

    monkeypatch.setattr(bridge._driver, "forward", forward)
    assert same(bridge(["ab", "bc"]), twin(twin.to_tokens(["ab", "bc"])))
    assert "attention_mask" not in given[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_in_front_of_texts_is_seen(side: str) -> None:
    bridge = bridged()
    before = bridge.to_tokens(["ab"] * 3)

    def over(*given: Any, **named: Any) -> torch.Tensor:
        cache = bridge(before, return_type="logits_and_cache")[1]
        logits: torch.Tensor = bridge(*given, past_key_values=cache, **named)
        return logits

    alone = [over(bridge.to_tokens(text).expand(3, -1))[0] for text in TEXTS]
    together = over(TEXTS, padding_side=side)
    for row, due in zip(together, alone, strict=True):
        got = row[-len(due) :] if side == "left" else row[: len(due)]
        assert torch.allclose(got, due, atol=1e-5)
    cache = bridge(before, return_type="logits_and_cache")[1]
    assert same(bridge(TEXTS, "logits", False, None, side, *[None] * 6, cache), together)


def test_a_given_mask_is_kept() -> None:
    bridge = bridged()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    tokens = bridge.to_tokens(["ab", "bc"])
    expected = bridge(tokens, attention_mask=mask)
    assert same(bridge(["ab", "bc"], attention_mask=mask), expected)
    assert not same(bridge(["ab", "bc"]), expected)


@pytest.mark.parametrize("call", ["generate", "generate_stream"])
def test_what_pads_may_be_a_text(call: str) -> None:
    bridge = bridged(pad_token=END)
    generate = getattr(bridge, call)
    if "attention_mask" not in signature(getattr(TransformerBridge, call)).parameters:
        pytest.skip("TransformerLens cannot be told a mask")
    asked = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "return_type": "tokens"}

    def made(texts: Any) -> torch.Tensor:
        got = generate(texts, prepend_bos=False, stop_at_eos=False, **asked)
        return got if call == "generate" else torch.cat(list(got), dim=1)

    texts = [f"{END}a", "abc", "b"]
    for row, text in zip(made(texts), texts, strict=True):
        (alone,) = made(text)
        assert row[-len(alone) :].tolist() == alone.tolist()


def test_a_text_may_be_cut_on_the_left() -> None:
    bridge = bridged(truncation_side="left")
    assert bridge.to_tokens("abc" * 3).tolist() == [[0, B, C, A, B, C]]
    assert bridge.to_tokens("abc" * 3, prepend_bos=False).tolist() == [[A, B, C, A, B, C]]
    assert bridge.to_tokens(["ab", "abc" * 3]).tolist()[0] == [0, A, B, 1, 1, 1]
    assert bridge.to_tokens("abc" * 3, truncate=False).shape == (1, 10)


def test_a_tokenizer_may_know_few_words(tmp_path: Any) -> None:
    digits = {"<pad>": 0, "<end>": 1, **{str(digit): digit + 2 for digit in range(10)}}
    named: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<end>"}
    kind: Any = PreTrainedTokenizerFast
    made = kind(tokenizer_object=Tokenizer(BPE(digits, [])), **named)
    made.save_pretrained(tmp_path)  # TransformerLens loads a tokenizer again
    knows = kind.from_pretrained(tmp_path)
    assert adapter.bridge(models.olmo(), knows).to_tokens("407").tolist() == [[1, 6, 2, 9]]


def test_without_a_tokenizer_text_is_refused() -> None:
    bridge = adapter.bridge(models.olmo())
    for text in ("a", ["a", "ab"]):
        with pytest.raises(ValueError, match="no tokenizer"):
            bridge(text)
