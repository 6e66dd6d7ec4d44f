"""Text: what a bridge makes of strings is what Hugging Face's tokenizer and model make by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from random import Random
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from conformance.checks.registry import Adapter, check
from conformance.checks.script import (
    END,
    TOKENIZERS,
    Script,
    decoded,
    hidden,
    ids,
    maskable,
    padded,
    same,
    script,
    text_cases,
)
from conformance.checks.support import drawing
from conformance.compare import Gap, compare_tensors, labelled
from conformance.inputs import inputs
from conformance.spec import Case
from conformance.subjects import at_work, bridged, reference
from conformance.tolerance import of_loss


@check(
    "text.tokens",
    "to_tokens, to_string, to_str_tokens, to_single_token, to_single_str_token and "
    "get_token_position say what the tokenizer file says: BOS or none, padding on either side, "
    "truncation, one text or several, empty or not; a tokenizer or default of BOS "
    "that is set later counts.",
    text_cases,
    examples=0.4,
)
def tokens(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """No model is run. An END that a tokenizer appends is taken off again: a text goes on."""
    told = script(case)
    bridge: Any = bridged(case.model, adapter, tokenizer=told.tokenizer()).bridge
    yield from labelled(told.label, _tokens(bridge, case, told))
    side = "right" if told.own_side == "left" else "left"
    setups = sorted(TOKENIZERS)
    setup = setups[(setups.index(told.setup) + 1) % len(setups)]
    other = replace(told, setup=setup, own_side=side, side=None, prepend=None)
    yield from labelled(other.label, _set_later(bridge, other))


def _tokens(bridge: Any, case: Case, told: Script) -> Iterator[Gap]:
    draw = Random(case.run.token_seed)
    truncate = draw.choice((True, False))
    rows = told.rows(truncate=truncate)
    due = padded(rows, left=told.left)[0]
    with at_work("to_tokens"):
        alone = [bridge.to_tokens(text, truncate=truncate, **told.asked) for text in told.texts]
        together = bridge.to_tokens(list(told.texts), truncate=truncate, **told.asked)
    for text, row, got in zip(told.texts, rows, alone, strict=True):
        yield from same(f"to_tokens({text!r})", torch.tensor([row]), got)
    yield from same(f"to_tokens({list(told.texts)!r})", due, together)
    yield from same("the tokenizer's padding_side", told.own_side, bridge.tokenizer.padding_side)
    rows = told.rows()
    strings = [[decoded([token]) for token in row] for row in rows]
    batch = [decoded(row) for row in due.tolist()]
    with at_work("to_str_tokens and to_string"):
        prepend = told.prepend
        pairs = {
            "to_str_tokens(texts)": (strings, bridge.to_str_tokens(list(told.texts), prepend)),
            "to_str_tokens(text)": (strings[0], bridge.to_str_tokens(told.texts[0], prepend)),
            "to_str_tokens(tensor)": (strings[0], bridge.to_str_tokens(torch.tensor(rows[0]))),
            "to_str_tokens(row)": (strings[0], bridge.to_str_tokens(torch.tensor(rows[:1]))),
            "to_str_tokens(array)": (strings[0], bridge.to_str_tokens(np.array(rows[0]))),
            "to_string(list)": (decoded(rows[0]), bridge.to_string(rows[0])),
            "to_string(tensor)": (decoded(rows[-1]), bridge.to_string(torch.tensor(rows[-1]))),
            "to_string(lists)": (batch, bridge.to_string(due.tolist())),
            "to_string(batch)": (batch, bridge.to_string(due)),
        }
    for name, (said, got) in pairs.items():
        yield from same(name, said, got)
    yield from _positions(bridge, told, rows[0])


def _set_later(bridge: Any, told: Script) -> Iterator[Gap]:
    """A tokenizer of another kind that pads on the other side, and then no BOS by default."""
    bridge.tokenizer = told.tokenizer()
    for prepend in (None, False):
        asked = replace(told, prepend=prepend).said()
        due = padded(asked.rows(), left=told.left)[0]
        with at_work("to_tokens by what has been set since"):
            bridge.cfg.default_prepend_bos = prepend is None
            got = bridge.to_tokens(list(asked.texts))
        yield from same(f"to_tokens of a tokenizer set later, {prepend=}", due, got)


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
        string = decoded([token])
        single = ids(string) == [token]
        got = said("to_single_token", string)
        yield from same(f"to_single_token({string!r})", token if single else None, got)
        if hasattr(bridge, "to_single_str_token"):
            got = said("to_single_str_token", token)
            yield from same(f"to_single_str_token({token})", string, got)
        first, last = row.index(token), len(row) - 1 - row[::-1].index(token)
        given = string if single else token
        for mode, due in (("first", first), ("last", last)):
            asked = {"mode": mode, "prepend_bos": told.prepend}
            in_text = said("get_token_position", given, told.texts[0], **asked)
            in_row = said("get_token_position", token, torch.tensor([row]), mode=mode)
            yield from same(f"get_token_position({given!r}, text, {mode!r})", due, in_text)
            yield from same(f"get_token_position({token}, tokens, {mode!r})", due, in_row)


@check(
    "text.forward",
    "Texts in, alone or together, padded on either side, give the logits, positions and patterns "
    "of Hugging Face's model on the tokens, mask and positions made by hand; over a cache, and "
    "under a mask that is given, too.",
    text_cases,
    examples=0.5,
)
def forward(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Only real tokens are compared. One text is also given as a string."""
    case = maskable(case)
    told = script(case)
    yield from labelled(told.label, _forward(adapter, case, told))


def _forward(adapter: Adapter, case: Case, told: Script) -> Iterator[Gap]:
    tokenizer: Any = told.tokenizer()
    if case.run.token_seed % 3 == 0:
        tokenizer.pad_token = END  # one token for both: where it stands in a text, it is no pad
    bridge: Any = bridged(case.model, adapter, tokenizer=tokenizer).bridge
    truth = reference(case.model).model
    rows = told.rows()
    given, mask = padded(rows, left=told.left)
    given = given.masked_fill(mask == 0, tokenizer.pad_token_id)
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
        got = cache[f"rotary_emb.hook_{name}"]
        pairs[f"rotary_emb.hook_{name}"] = due, got.expand(len(due), *got.shape[1:])
    for layer, pattern in enumerate(expected.attentions):
        name = f"blocks.{layer}.attn.hook_pattern"
        pairs[name] = pattern.transpose(1, 2), cache[name].transpose(1, 2)
    real = mask.bool()
    for name, (due, got) in pairs.items():
        yield from _same_where(real, name, due, got)
    draw = drawing(case)
    cached = bool(draw(2))
    by_position = cached and draw(3) > 0
    if len(rows) > 1 and draw(2):
        mask = hidden(mask, draw)
        named = {("attention_mask", "one_zero_attention_mask")[draw(2)]: mask}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            due = truth(given, attention_mask=mask, position_ids=positions).logits
            with at_work("a forward of text under a mask"):
                got = bridge(texts, **named, **told.asked)
        yield from _same_where(mask.bool(), f"logits under {', '.join(named)}", due, got)
    if cached:  # the last: of the texts behind a cache dynamic RoPE remembers the length
        yield from _over_a_cache(bridge, truth, case, told, by_position=by_position)


def _over_a_cache(
    bridge: Any, truth: Any, case: Case, told: Script, *, by_position: bool
) -> Iterator[Gap]:
    """The same texts, behind tokens that each model has in a cache."""
    before = inputs(case).tokens
    given, new = padded(told.rows(), left=told.left)
    mask = torch.cat([torch.ones_like(before), new], dim=1)
    positions = (mask.cumsum(-1) - 1)[:, -new.shape[1] :]
    named = {"attention_mask": mask, "position_ids": positions}
    texts = told.texts[0] if len(new) == 1 else list(told.texts)
    with torch.no_grad():
        filled = truth(before, use_cache=True).past_key_values
        expected = truth(given, past_key_values=filled, **named).logits
        with at_work("a forward of text over a cache"):
            cache = bridge(before, return_type="logits_and_cache")[1]
            call = signature(TransformerBridge.forward)
            said = call.bind(bridge, texts, past_key_values=cache, **told.asked)
            if by_position:
                said.apply_defaults()  # all but the last stand before it
            logits = bridge(*said.args[1:], **said.kwargs)
    yield from _same_where(new.bool(), "logits over a cache", expected, logits)


def _same_where(
    real: torch.Tensor, name: str, due: torch.Tensor, got: torch.Tensor
) -> Iterator[Gap]:
    """The gap between tensors of real tokens ``[batch, pos, ...]``."""
    if got.shape[: real.ndim] != real.shape:
        yield Gap(name, "shape", f"{list(got.shape)} instead of {list(due.shape)}")
        return
    yield from same(name, due[real], got[real])


@check(
    "text.loss",
    "The loss of texts, in all and by token, is Hugging Face's over the pairs of real tokens.",
    text_cases,
    examples=0.35,
)
def loss(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Pads have no label by hand, on whichever side they are."""
    case = maskable(case)
    told = script(case)
    yield from labelled(told.label, _loss(adapter, case, told))


def _loss(adapter: Adapter, case: Case, told: Script) -> Iterator[Gap]:
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
    yield from same("loss per token", -chances[..., 0][pairs], by_token[pairs])
