"""Generation by transformer_lens' own loop: the tokens and the logits are Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.caches import from_the_seed
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of
from conformance.compare import Gap, bitwise
from conformance.inputs import Inputs, derived_positions, inputs
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import cases, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.taps import TappedCache, Taps


def generating_runs(model: ModelSpec, **narrower: Any) -> SearchStrategy[RunSpec]:
    """Runs of a prompt whose last token is attended to: what follows a pad is nobody's promise."""
    given = {
        "lengths": st.sampled_from((1, 2, 3, 5, 8, 24)),
        "paddings": st.sampled_from(("none", "left", "gap")),
        "positions": st.just("derived"),
        "chunks": st.just(1),
        **narrower,
    }

    def attended(run: RunSpec) -> RunSpec:
        return replace(run, padding="none") if run.padding == "right" else run

    return run_specs(model, **given).map(attended)


def generating_cases() -> SearchStrategy[Case]:
    """Cases of `generating_runs`."""
    return cases(runs=generating_runs)


@dataclass(frozen=True)
class Text:
    """What a generation gave.

    Attributes:
        tokens: ``[batch, pos]``: of the prompt, if it had tokens, and all new ones.
        logits: Of each step, ``[batch, d_vocab]``, as float32.
        random_state: PyTorch's, when all was generated.
    """

    tokens: torch.Tensor
    logits: tuple[torch.Tensor, ...]
    random_state: torch.Tensor

    @staticmethod
    def of(output: Any) -> Text:
        """From what either side has just returned."""
        logits = tuple(step.float() for step in output.logits)
        return Text(output.sequences, logits, torch.get_rng_state())


def steps_of(case: Case) -> int:
    """How many tokens are generated: two to six."""
    return 2 + case.run.token_seed % 5


def by_hugging_face(
    case: Case, data: Inputs, watched: Callable[[Subject], Taps] | None = None, **options: Any
) -> Text:
    """What Hugging Face's own generate gives, of a fresh model: dynamic RoPE remembers lengths.

    It would take pad tokens for padding if it were given no mask, and compute the last logits of
    the prompt alone, which rounds elsewhere.

    Args:
        case: The case.
        data: Its tensors.
        watched: Makes taps that are on meanwhile.
        options: More of generate's.
    """
    mask = data.attention_mask
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(data.tokens) if mask is None else mask,
        "max_new_tokens": steps_of(case),
        "do_sample": False,
        "use_cache": case.run.use_cache,
        "logits_to_keep": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    if "inputs_embeds" not in given:
        given["inputs"] = data.tokens
    truth = reference(case.model)
    around: AbstractContextManager[None] = nullcontext()
    if watched is not None:
        taps = watched(truth)
        around = taps.attached()
        if case.run.use_cache:
            given["past_key_values"] = TappedCache(taps, config=truth.model.config)
        if mask is not None:  # of padding it would derive others
            given["position_ids"] = derived_positions(mask)
    model: Any = truth.model
    with from_the_seed(case, truth), around:
        return Text.of(model.generate(**given))


def bridge_options(case: Case, data: Inputs, **options: Any) -> dict[str, Any]:
    """The options of a bridge's generate: greedy and endless, unless others are given."""
    return {
        "attention_mask": data.attention_mask,
        "max_new_tokens": steps_of(case),
        "do_sample": False,
        "stop_at_eos": False,
        "use_past_kv_cache": case.run.use_cache,
        "verbose": False,
        **options,
    }


def by_bridge(
    subject: Subject, case: Case, data: Inputs, prompt: torch.Tensor | None = None, **options: Any
) -> Text:
    """What a bridge's generate gives for the tokens, or for another prompt."""
    asked = bridge_options(case, data, output_logits=True, **options)
    with from_the_seed(case, subject), at_work("generating"):
        return Text.of(
            bridge_of(subject).generate(data.tokens if prompt is None else prompt, **asked)
        )


def by_hf_generate(subject: Subject, case: Case, data: Inputs) -> Text:
    """What a bridge's hf_generate gives, greedily, at the positions of `by_hugging_face`."""
    mask = data.attention_mask
    asked = {
        "attention_mask": torch.ones_like(data.tokens) if mask is None else mask,
        "position_ids": None if mask is None else derived_positions(mask),
        "max_new_tokens": steps_of(case),
        "do_sample": False,
        "stop_at_eos": False,
        "use_past_kv_cache": case.run.use_cache,
        "logits_to_keep": 0,
        "output_logits": True,
    }
    with from_the_seed(case, subject), at_work("hf_generate"):
        return Text.of(bridge_of(subject).hf_generate(data.tokens, **asked))


def generating(case: Case, adapter: Adapter) -> Subject:
    """A bridged subject whose forwards have a cache just where the case's have one."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    # Without a cache of its own a forward would still make one, and lay keys out as that does.
    subject.model.config.use_cache = case.run.use_cache
    return subject


def differing_texts(expected: Text, actual: Text) -> Iterator[Gap]:
    """The logits of each step, bit for bit, then all tokens, and what would be drawn next."""
    if len(expected.logits) != len(actual.logits):
        told = f"{len(actual.logits)} steps instead of {len(expected.logits)}"
        yield Gap("steps", "count", told)
    for step, (due, got) in enumerate(zip(expected.logits, actual.logits, strict=False)):
        yield from bitwise(f"logits of step {step}", due, got)
    yield from bitwise("tokens", expected.tokens, actual.tokens)
    yield from bitwise("random state", expected.random_state, actual.random_state)


def differing_streams(
    expected: Text, subject: Subject, case: Case, **options: Any
) -> Iterator[Gap]:
    """The tokens of generate_stream with these options, in pieces of a drawn size, as one text.

    Of a stream that takes no mask `generation.stream` tells: known defect no-mask-of-a-stream.
    """
    stream = getattr(bridge_of(subject), "generate_stream", None)
    if stream is None:
        return
    taken = signature(stream).parameters.values()
    if not any(each.name == "attention_mask" or each.kind is each.VAR_KEYWORD for each in taken):
        return
    data = inputs(case)
    asked = bridge_options(case, data, max_tokens_per_yield=1 + case.run.token_seed % 3, **options)
    with from_the_seed(case, subject), at_work("generate_stream"):
        pieces = list(stream(data.tokens, **asked))
        state = torch.get_rng_state()
    yield from bitwise("tokens of the stream", expected.tokens, torch.cat(pieces, dim=1))
    yield from bitwise("random state after the stream", expected.random_state, state)


def ends(case: Case, new: torch.Tensor) -> list[int]:
    """No end of text, one or two, of tokens ``[batch, step]`` that are generated without one."""
    count = case.run.token_seed % 3
    draw = torch.Generator().manual_seed(case.run.token_seed)
    picked = new.flatten()[torch.randint(0, new.numel(), (count,), generator=draw)]
    return [int(token) for token in picked]


def _said(tokens: Sequence[int]) -> Any:
    """One end of text as it is, several as a list."""
    return tokens[0] if len(tokens) == 1 else list(tokens)


@check(
    "generation.greedy",
    "Greedy generation, with and without a cache, from padded and unpadded prompts, gives Hugging "
    "Face's tokens and logits at every step; rows stop at an end of text, and are padded with it.",
    generating_cases,
    examples=0.35,
)
def greedy(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The ends of text are tokens that do come, so that rows stop, each at its time."""
    data = inputs(case)
    expected = by_hugging_face(case, data)
    stops = ends(case, expected.tokens[:, case.run.seq_len :])
    options: dict[str, Any] = {}
    if stops:
        stopping = {"eos_token_id": _said(stops), "pad_token_id": stops[0]}
        expected = by_hugging_face(case, data, **stopping)
        options = {"eos_token_id": _said(stops), "stop_at_eos": True}
    yield from differing_texts(
        expected, by_bridge(generating(case, adapter), case, data, **options)
    )


@check(
    "generation.embeddings",
    "Generation from embeddings, masked or not, gives the tokens and logits that Hugging Face's "
    "does.",
    generating_cases,
    examples=0.25,
)
def embeddings(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Of a text, or moved to where no token has one. Only the new tokens are returned."""
    data = inputs(case)
    prompt = reference(case.model).model.model.embed_tokens(data.tokens).detach()
    if case.run.use_cache:
        draw = torch.Generator().manual_seed(case.run.token_seed)
        prompt = prompt + torch.randn(prompt.shape, generator=draw).to(prompt.dtype)
        expected = by_hugging_face(case, data, inputs_embeds=prompt)
    else:  # Hugging Face's loop forgets the embeddings after a step that kept no cache
        whole = by_hugging_face(case, data)
        expected = replace(whole, tokens=whole.tokens[:, case.run.seq_len :])
    yield from differing_texts(expected, by_bridge(generating(case, adapter), case, data, prompt))
