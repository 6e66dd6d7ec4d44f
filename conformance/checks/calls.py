"""The ways to call a bridge: what may stand for tokens, masks and the model's own attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformers import DynamicCache, StaticCache

from conformance.checks.caches import Chunk, chunks_of, from_the_seed
from conformance.checks.forked import edit_behind_flags, under_flags
from conformance.checks.forward import logits_gap
from conformance.checks.layernorm import wide_cases
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward, turn
from conformance.compare import Gap, bitwise, compare_parameters, within
from conformance.inputs import Inputs, derived_positions, inputs
from conformance.observe import observe
from conformance.spec import Case
from conformance.strategies import cases, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import of_other_attention


def told(case: Case, data: Inputs, *, derived: bool) -> dict[str, Any]:
    """Mask, positions and cache flag of a forward.

    Args:
        case: The case.
        data: Its tensors.
        derived: Tell the positions that follow from the mask too: a bridge derives them itself.
    """
    given: dict[str, Any] = {"attention_mask": data.attention_mask, "use_cache": case.run.use_cache}
    positions = data.position_ids
    if positions is None and data.attention_mask is not None and derived:
        positions = derived_positions(data.attention_mask)
    return given if positions is None else {**given, "position_ids": positions}


def taken_gradients(subject: Subject) -> dict[str, torch.Tensor]:
    """The gradients that a backward left, by Hugging Face's names; afterwards there are none."""
    found = {name: p.grad for name, p in subject.parameters.items() if p.grad is not None}
    for parameter in subject.parameters.values():
        parameter.grad = None
    return found


def unpaired(expected: Mapping[str, object], actual: Mapping[str, object]) -> Iterator[Gap]:
    """What one side has a gradient of and the other has not."""
    for name in sorted(expected.keys() ^ actual.keys()):
        yield Gap(name, "missing" if name in expected else "extra", "a gradient on one side only")


def differing_gradients(
    expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor], of: str = ""
) -> Iterator[Gap]:
    """The gaps between two sets of gradients, which must be of the same parameters."""
    yield from unpaired(expected, actual)
    for name in expected.keys() & actual.keys():
        yield from bitwise(f"{name}{of}", expected[name], actual[name], kind="gradient")


def embedded_cases() -> SearchStrategy[Case]:
    """Cases of which most have a mask."""
    kinds = st.sampled_from(("none", "gap", "left", "rows"))
    return cases(runs=partial(run_specs, paddings=kinds))


@check(
    "calls.embeddings",
    "Embeddings in the place of tokens give the logits that they give Hugging Face's model, those "
    "of their tokens if they are a text's, also where an edit is behind a flag or a cache before "
    "them, and the same gradients, that of the embeddings too.",
    embedded_cases,
    examples=0.3,
)
def embeddings(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The tokens' own embeddings, every other time moved to where no token has one."""
    case = in_one_forward(case)
    data = inputs(case)
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = bridge_of(subject)
    draw = torch.Generator().manual_seed(case.run.token_seed)
    text = truth.model.model.embed_tokens(data.tokens).detach()
    of_a_text, by_name = case.run.token_seed % 2 == 0, case.run.token_seed % 3 == 0
    given = text if of_a_text else text + torch.randn(text.shape, generator=draw).to(text.dtype)

    def run(who: Subject, source: torch.Tensor) -> torch.Tensor:
        rest = told(case, data, derived=who is truth)
        (who.bridge or who.model).train(case.run.training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.run.token_seed)
            logits: torch.Tensor
            if who is truth:
                logits = who.model(inputs_embeds=source, **rest).logits
            elif by_name and source.is_floating_point():
                logits = bridge(None, inputs_embeds=source, **rest)
            else:
                logits = bridge(source, **rest)
        return logits

    theirs, ours = given.clone().requires_grad_(), given.clone().requires_grad_()
    expected = run(truth, theirs)
    expected.backward(data.probe.to(expected.dtype))  # type: ignore[no-untyped-call]
    with at_work("running on embeddings"):
        actual = run(subject, ours)
        actual.backward(data.probe.to(actual.dtype))  # type: ignore[no-untyped-call]
        got = taken_gradients(subject)
        of_tokens = run(subject, data.tokens) if of_a_text else actual
    yield from bitwise("logits", expected, actual)
    yield from bitwise("logits of the tokens", expected, of_tokens)
    assert theirs.grad is not None
    if ours.grad is None:
        yield Gap("embeddings", "missing", "no gradient reached them")
    else:
        yield from bitwise("embeddings", theirs.grad, ours.grad, kind="gradient")
    yield from differing_gradients(taken_gradients(truth), got)
    pick = drawing(case)
    if of_a_text:
        flagged = under_flags(case, pick)
        turn(subject, flagged.run.flags, True)
        edit_behind_flags(subject, flagged)
        with torch.no_grad(), at_work(f"running under {flagged.run.flags}"):
            of_tokens, actual = run(subject, data.tokens), run(subject, given)
        yield from bitwise(f"logits under {flagged.run.flags}", of_tokens, actual)
    elif case.run.seq_len > 1:
        yield from _over_a_cache(case, given, 1 + pick(case.run.seq_len - 1), truth, subject)


def _over_a_cache(
    case: Case, given: torch.Tensor, start: int, truth: Subject, subject: Subject
) -> Iterator[Gap]:
    """The rest of ``given`` ``[batch, pos, d_model]``, behind tokens that a cache holds."""
    first, rest = (Chunk(inputs(case), *ends) for ends in ((0, start), (start, case.run.seq_len)))

    def logits(who: Subject) -> torch.Tensor:
        def call(tokens: torch.Tensor, **named: Any) -> Any:
            if who is truth:
                return who.model(inputs_embeds=given[:, start:], **named).logits
            return bridge_of(who)(given[:, start:], **named)

        cache = DynamicCache(config=who.model.config)
        with from_the_seed(case, who):
            first.logits(who, cache)
            found: torch.Tensor = rest.forward(who, cache, call)
        return found

    with at_work("embeddings over a cache"):
        actual = logits(subject)
    yield from bitwise("logits over a cache", logits(truth), actual)


def single_rows() -> SearchStrategy[Case]:
    """Cases of one row."""
    return cases(runs=partial(run_specs, batches=st.just(1)))


@check(
    "calls.tokens",
    "Tokens in one row without a batch, of a shorter integer type, not contiguous, or with "
    "prepend_bos and padding_side, which are for strings, give the logits of the same tokens, pad "
    "tokens inside the text as any other.",
    single_rows,
    examples=0.1,
)
def tokens(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Each form, in eval mode, of a text that has pad tokens as words."""
    case = in_one_forward(case, training=False)
    (text,) = inputs(case).tokens.tolist()
    text[:-1:2] = [case.model.pad_token_id or 0] * len(text[:-1:2])
    case = replace(case, tokens=(tuple(text),))
    data = inputs(case)
    expected = observe(reference(case.model), case, backward=False).logits
    bridge = bridge_of(bridged(case.model, adapter, prepared=case.run.prepared)).eval()
    rest = told(case, data, derived=False)
    forms: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "as they are": (data.tokens, rest),
        "one row": (data.tokens[0], rest),
        "int32": (data.tokens.int(), rest),
        "not contiguous": (data.tokens.repeat_interleave(2, dim=1)[:, ::2], rest),
        "for strings": (data.tokens, {**rest, "prepend_bos": True, "padding_side": "left"}),
    }
    for name, (given, options) in forms.items():
        with at_work(name), torch.no_grad():
            actual = bridge(given, **options)
        yield from bitwise(f"logits, {name}", expected, actual)


@check(
    "calls.sdpa",
    "A model loaded with sdpa attention and then bridged has the eager reference's logits and "
    "gradients bit for bit, whether it was prepared or not; one that is told sdpa as a bridge has "
    "its logits over a cache of fixed size.",
    cases,
    examples=0.25,
)
def sdpa(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The bridge computes attention itself, whatever the model was loaded with."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared, attention="sdpa")
    expected, actual = observe(reference(case.model), case), observe(subject, case)
    yield from logits_gap(expected, actual)
    yield from compare_parameters(expected, actual)
    if case.run.padding == "none":  # of padding Hugging Face's own logits are others under sdpa
        yield from _told_later(adapter, in_one_forward(case))


def _told_later(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Hugging Face leaves out a mask for sdpa, also where a cache has room behind the tokens."""
    truth, subject = reference(case.model), bridged(case.model, adapter, prepared=case.run.prepared)
    (chunk,) = chunks_of(case, inputs(case))

    def logits(who: Subject) -> torch.Tensor:
        cache = StaticCache(config=who.model.config, max_cache_len=case.run.seq_len + 2)
        with from_the_seed(case, who):
            return chunk.logits(who, cache)

    with at_work("a cache of fixed size under sdpa"):
        subject.model.set_attn_implementation("sdpa")
        actual = logits(subject)
    yield from bitwise("logits over a cache of fixed size", logits(truth), actual)


@check(
    "calls.sdpa_reference",
    "A bridged model has the logits of an sdpa reference, and the gradients of its real tokens, up "
    "to rounding.",
    wide_cases,
    examples=0.25,
)
def sdpa_reference(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """In eval mode: sdpa draws another dropout. A padding token's own row is nobody's promise."""
    case = in_one_forward(case, training=False)
    data = inputs(case)
    mask = data.attention_mask
    real = torch.ones_like(data.tokens) if mask is None else mask

    def run(who: Subject) -> dict[str, torch.Tensor]:
        """The logits of the tokens that are attended to, and the gradients of these alone."""
        result = (who.bridge or who.model)(data.tokens, **told(case, data, derived=not who.bridge))
        logits = result if isinstance(result, torch.Tensor) else result.logits
        logits.backward(data.probe.to(logits.dtype) * real[..., None])
        return {"logits": logits.detach()[real.bool()], **taken_gradients(who)}

    expected, eager = (run(reference(case.model, attention=kind)) for kind in ("sdpa", "eager"))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    with at_work("running"):
        bridge_of(subject).eval()
        actual = run(subject)
    yield from unpaired(expected, actual)
    # A gradient may cancel to nothing: what is rounded is as large as the greatest of them all.
    greatest = max(float(due.abs().max()) for name, due in expected.items() if name != "logits")
    for name in expected.keys() & actual.keys():
        scale = float(expected[name].abs().max()) if name == "logits" else greatest
        allowance = of_other_attention(scale, expected[name], eager[name])
        yield from within(allowance, name, expected[name], actual[name])
