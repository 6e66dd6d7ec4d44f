"""Embeddings mean what tokens mean; Hugging Face's generation needs no tokenizer."""

from __future__ import annotations

from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BatchFeature

from adapter.tests import models
from adapter.tests.models import GAP, LEFT, TOKENS, positions, same

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


@pytest.mark.parametrize("mask", [None, LEFT, GAP, GAP.bool()], ids=["none", "left", "gap", "bool"])
def test_embeddings_take_the_positions_of_their_tokens(mask: Any) -> None:
    reference, bridge = models.pair(clip_qkv=0.5)
    embeddings = reference.model.embed_tokens(TOKENS).detach()
    logits = bridge(embeddings, attention_mask=mask)
    assert same(logits, bridge(TOKENS, attention_mask=mask))
    real = ... if mask is None else mask.bool()
    where = None if mask is None else positions(mask)
    expected = reference(inputs_embeds=embeddings, attention_mask=mask, position_ids=where).logits
    assert same(logits[real], expected[real])
    kept = bridge(None, inputs_embeds=embeddings, attention_mask=mask)
    assert same(kept, logits)


def test_embeddings_find_their_mask_however_it_is_given() -> None:
    reference, bridge = models.pair()
    embeddings = reference.model.embed_tokens(TOKENS).detach()
    expected = bridge(TOKENS, attention_mask=GAP)
    assert same(bridge(embeddings, "logits", False, None, None, GAP), expected)
    assert same(bridge(embeddings, one_zero_attention_mask=GAP), expected)


def test_given_positions_are_kept() -> None:
    reference, bridge = models.pair()
    embeddings = reference.model.embed_tokens(TOKENS).detach()
    where = torch.arange(6).flip(0)[None]
    logits = bridge(embeddings, attention_mask=GAP, position_ids=where)
    assert same(logits, bridge(TOKENS, attention_mask=GAP, position_ids=where))


def test_embeddings_over_a_cache() -> None:
    reference, bridge = models.pair()
    embeddings = reference.model.embed_tokens(TOKENS).detach()
    expected, cache = bridge(
        TOKENS[:, :4], attention_mask=GAP[:, :4], return_type="logits_and_cache"
    )
    expected = bridge(TOKENS[:, 4:], attention_mask=GAP, past_key_values=cache)
    _, cache = bridge(embeddings[:, :4], attention_mask=GAP[:, :4], return_type="logits_and_cache")
    assert same(bridge(embeddings[:, 4:], attention_mask=GAP, past_key_values=cache), expected)


def test_a_later_layer_starts_at_the_positions_of_the_mask() -> None:
    _, bridge = models.pair()
    expected, cache = bridge.run_with_cache(TOKENS, attention_mask=GAP)
    residual = cache["blocks.1.hook_resid_pre"]
    assert same(bridge(residual, attention_mask=GAP, start_at_layer=1), expected)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("mask", [None, LEFT, GAP], ids=["none", "left", "gap"])
def test_generation_from_embeddings_is_that_from_tokens(mask: Any, cached: bool) -> None:
    reference, bridge = models.pair()
    embeddings = reference.model.embed_tokens(TOKENS).detach()
    options = {**GREEDY, "verbose": False, "stop_at_eos": False, "use_past_kv_cache": cached}
    tokens = bridge.generate(TOKENS, attention_mask=mask, **options)
    assert same(bridge.generate(embeddings, attention_mask=mask, **options), tokens[:, 6:])


def test_hf_generate_needs_no_tokenizer() -> None:
    reference, bridge = models.pair()
    for options in (GREEDY, {**GREEDY, "num_beams": 3}, {**GREEDY, "attention_mask": LEFT}):
        assert same(bridge.hf_generate(TOKENS, **options), reference.generate(TOKENS, **options))


def test_hf_generate_takes_the_tokenizers_end() -> None:
    reference, bridge = models.pair()
    end = int(reference.generate(TOKENS, **GREEDY)[0, 7])
    bridge._tokenizer = SimpleNamespace(eos_token_id=end)
    options = {**GREEDY, "attention_mask": torch.ones_like(TOKENS)}
    expected = reference.generate(TOKENS, eos_token_id=end, pad_token_id=end, **options)
    assert same(bridge.hf_generate(TOKENS, **options), expected)
    expected = reference.generate(TOKENS, eos_token_id=end, pad_token_id=3, **options)
    assert same(bridge.hf_generate(TOKENS, pad_token_id=3, **options), expected)


def test_hf_generate_finds_the_models_padding_whatever_the_tokenizers_end() -> None:
    reference, bridge = models.pair()
    padded = TOKENS * LEFT  # the pad token is 0
    for end in (3, 0):
        bridge._tokenizer = SimpleNamespace(eos_token_id=end)
        for ends in (None, [end, 5]):
            asked: dict[str, Any] = GREEDY if ends is None else {**GREEDY, "eos_token_id": ends}
            mask = torch.ones_like(LEFT) if end == 0 else LEFT  # as Hugging Face takes it
            theirs = {**asked, "eos_token_id": ends or end, "pad_token_id": end}
            expected = reference.generate(padded, attention_mask=mask, **theirs)
            assert same(bridge.hf_generate(padded, **asked), expected)
    bridge._tokenizer = SimpleNamespace(eos_token_id=int(TOKENS[0, 0]))  # no padding, though a pad
    due = reference.generate(TOKENS, eos_token_id=0, **GREEDY)
    assert same(bridge.hf_generate(TOKENS, eos_token_id=0, **GREEDY), due)
    ones = reference.generate(padded, attention_mask=torch.ones_like(LEFT), **GREEDY)
    assert not same(reference.generate(padded, **GREEDY), ones)


def test_a_generation_in_a_hook_of_one_leaves_the_outer_its_cache() -> None:
    _, bridge = models.pair()
    asked: dict[str, Any] = {**GREEDY, "verbose": False, "stop_at_eos": False}
    lengths: list[int] = []

    def generate(tensor: torch.Tensor, hook: Any) -> None:
        lengths.append(tensor.shape[1])
        if len(lengths) == 1:
            with bridge.hooks(reset_hooks_end=False):
                bridge.generate(TOKENS[:1, :2], **asked)
            del lengths[1:]

    with bridge.hooks([("blocks.0.hook_resid_post", generate)]):
        bridge.generate(TOKENS, **asked)
    assert lengths == [6, 1, 1, 1, 1]


def test_generations_in_two_threads_have_each_its_own_cache() -> None:
    _, bridge = models.pair()
    asked: dict[str, Any] = {**GREEDY, "verbose": False, "stop_at_eos": False}
    expected = bridge.generate(TOKENS, **asked)
    lengths: list[int] = []

    def meanwhile(tensor: torch.Tensor, hook: Any) -> None:
        lengths.append(tensor.shape[1])
        if len(lengths) == 1:
            other = Thread(target=bridge.generate, args=(TOKENS[:1, :2],), kwargs=asked)
            other.start()
            other.join()
            del lengths[1:]

    with bridge.hooks([("blocks.0.hook_resid_post", meanwhile)]):
        assert same(bridge.generate(TOKENS, **asked), expected)
    assert lengths == [6, 1, 1, 1, 1]


def test_hf_generate_stops_where_it_is_told() -> None:
    reference, bridge = models.pair()
    free = reference.generate(TOKENS, **GREEDY)
    end = int(free[0, 7])
    for model in (reference, bridge.original_model):
        model.generation_config.eos_token_id = end
    assert same(bridge.hf_generate(TOKENS, **GREEDY), reference.generate(TOKENS, **GREEDY))
    assert same(bridge.hf_generate(TOKENS, stop_at_eos=False, **GREEDY), free)
    for model in (reference, bridge.original_model):
        model.generation_config.eos_token_id = None
    expected = reference.generate(TOKENS, eos_token_id=[end, 3], **GREEDY)
    assert same(bridge.hf_generate(TOKENS, eos_token_id=[end, 3], **GREEDY), expected)


def test_hf_generate_without_a_cache_has_none() -> None:
    _, bridge = models.pair()
    lengths: list[int] = []
    look = [("embed.hook_in", lambda tensor, hook: lengths.append(tensor.shape[1]))]
    for cached, seen in ((True, [6, 1, 1, 1, 1]), (False, [6, 7, 8, 9, 10])):
        lengths.clear()
        with bridge.hooks(fwd_hooks=look):
            bridge.hf_generate(TOKENS, use_past_kv_cache=cached, **GREEDY)
        assert lengths == seen


def test_hf_generate_records_what_is_asked_for() -> None:
    reference, bridge = models.pair()
    asked = dict.fromkeys(("output_logits", "output_attentions", "output_hidden_states"), True)
    found = bridge.hf_generate(TOKENS, **GREEDY, **asked)
    due = reference.generate(TOKENS, return_dict_in_generate=True, **GREEDY, **asked)
    assert same(found.sequences, due.sequences)
    assert all(same(a, b) for a, b in zip(found.logits, due.logits, strict=True))
    for name in ("attentions", "hidden_states"):
        steps = zip(found[name], due[name], strict=True)
        assert all(same(a, b) for x, y in steps for a, b in zip(x, y, strict=True))


def test_strings_go_the_way_of_transformer_lens() -> None:
    _, bridge = models.pair()

    class Words:
        eos_token_id = 3

        def __call__(self, text: str, **_: Any) -> Any:
            class Batch(dict[str, Any]):
                def to(self, _: Any) -> Any:
                    return self

            return Batch(input_ids=torch.tensor([[int(word) for word in text.split()]]))

        def decode(self, tokens: torch.Tensor, **_: Any) -> str:
            return " ".join(map(str, tokens.tolist()))

    bridge._tokenizer = Words()
    text = bridge.hf_generate("5 9 3 40", **GREEDY)
    expected = bridge.hf_generate(TOKENS[:1, :4], **GREEDY)[0].tolist()
    assert text == " ".join(map(str, expected))


def test_hf_generate_of_one_text_takes_none_of_it_for_padding() -> None:
    reference, bridge = models.pair()
    tokens = torch.tensor([[3, 9, 3, 40]])

    class Words:
        eos_token_id = 3

        def __call__(self, text: str, **_: Any) -> Any:
            return BatchFeature({"input_ids": tokens})

        def decode(self, made: torch.Tensor, **_: Any) -> str:
            return str(made.tolist())

    bridge._tokenizer = Words()
    due = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    asked: tuple[dict[str, Any], ...] = ({"stop_at_eos": False}, {"eos_token_id": 63})
    for options in asked:
        assert bridge.hf_generate("3 9 3 40", **GREEDY, **options) == str(due[0].tolist())
