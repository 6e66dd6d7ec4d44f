"""Masks: what each way to write one means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.calls import told
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward
from conformance.compare import Gap, bitwise
from conformance.inputs import Inputs, inputs
from conformance.spec import Case
from conformance.strategies import cases, run_specs
from conformance.subjects import at_work, bridged, reference
from conformance.verdict import NotApplicable


def masked_cases() -> SearchStrategy[Case]:
    """Cases with a mask, fed at once. float64 pads on the right alone (see `run_specs`)."""
    kinds = st.sampled_from(("left", "gap", "rows", "right"))
    lengths, positions = st.sampled_from((2, 3, 5, 8, 24)), st.just("derived")
    narrower: dict[str, Any] = {"paddings": kinds, "lengths": lengths, "positions": positions}
    return cases(runs=partial(run_specs, chunks=st.just(1), **narrower))


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees, ``[batch, 1, query, key]``."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]


def _masked(case: Case) -> tuple[Inputs, torch.Tensor]:
    """The tensors of a case and its mask; where rows may begin with pads, one has nothing else."""
    data = inputs(case)
    mask = data.attention_mask
    if mask is None:
        raise NotApplicable("nothing is padded: there is no mask")
    if case.run.padding in ("left", "rows"):
        blank = torch.arange(case.run.batch)[:, None] == case.run.token_seed % case.run.batch
        mask, tokens = (
            mask.masked_fill(blank, 0),
            data.tokens.masked_fill(blank, case.model.pad_token_id or 0),
        )
        data = replace(data, tokens=tokens, attention_mask=mask)
    return data, mask


def hard_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask that Hugging Face's eager attention takes, of which keys are seen."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def soft_mask(seen: torch.Tensor, heads: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """An additive mask that leaves more of some keys than of others, as ALiBi's does.

    Args:
        seen: Which keys a query sees at all, ``[batch, 1, query, key]``.
        heads: Number of heads, each with biases of its own.
        dtype: Of the mask.
        seed: Draws the biases.

    Returns:
        ``[batch, head, query, key]``
    """
    draw = torch.Generator().manual_seed(seed)
    batch, _, *queries_keys = seen.shape
    biases = torch.randn((batch, heads, *queries_keys), generator=draw).to(dtype)
    return biases.masked_fill(~seen, torch.finfo(dtype).min)


def _forms(mask: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """A mask of 0 and 1 said in other ways: name, mask, and whether positions follow from it."""
    for kind in (torch.bool, torch.int32, torch.uint8, torch.float32, dtype):
        yield f"{kind} mask", mask.to(kind), True
    seen = _seen(mask)
    yield "boolean 4-D mask", seen, False
    yield "additive 4-D mask", hard_mask(seen, dtype), False


@check(
    "calls.masks",
    "A mask of any boolean, integer or floating type, [batch, pos] or four-dimensional, of tokens "
    "or of embeddings, means what it means to Hugging Face as integers, also for a row of "
    "padding alone; one of biases, another for each head, what it means to Hugging Face.",
    masked_cases,
    examples=0.25,
)
def masks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every form, against the reference's int64. A 4-D mask comes with its positions."""
    case = in_one_forward(case, training=False)
    draw = drawing(case)
    data, flat = _masked(case)
    truth = reference(case.model)
    given = told(case, data, derived=True)
    with torch.no_grad():
        expected = truth.model.train(False)(data.tokens, **given).logits
    bridge = bridge_of(bridged(case.model, adapter, prepared=case.run.prepared)).eval()
    words = truth.model.model.embed_tokens(data.tokens).detach()
    sources = {"tokens": data.tokens, "embeddings": words}
    for name, mask, is_flat in _forms(flat, expected.dtype):
        given = {**told(case, data, derived=not is_flat), "attention_mask": mask}
        for kind, source in sources.items():
            with at_work(f"{name}, {kind}"), torch.no_grad():
                actual = bridge(source, **given)
            yield from bitwise(f"logits, {name}, {kind}", expected, actual)
    dtype = (expected.dtype, torch.float32)[draw(2)]
    heads = case.model.num_attention_heads
    mask = soft_mask(_seen(flat), heads, dtype, case.run.token_seed)
    given = {**told(case, data, derived=True), "attention_mask": mask}
    with torch.no_grad():
        expected = truth.model(data.tokens, **given).logits
        with at_work("biases"):
            actual = bridge(data.tokens, **given)
    yield from bitwise(f"logits, biases of {dtype}", expected, actual)
