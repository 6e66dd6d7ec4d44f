"""Sampling and beams: from the same random state, the draws of Hugging Face's generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Cache,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conformance.checks.caches import differing_caches, from_the_seed
from conformance.checks.generation import (
    by_bridge,
    by_hugging_face,
    differing_streams,
    differing_texts,
    generating,
    generating_cases,
    steps_of,
)
from conformance.checks.registry import Adapter, check
from conformance.checks.script import by_hand
from conformance.checks.support import bridge_of, drawing
from conformance.compare import Gap, bitwise
from conformance.data import TRAINED
from conformance.inputs import inputs
from conformance.spec import Case
from conformance.subjects import at_work, reference

END = 2  # a token of every vocabulary


class FrequencyPenalty(LogitsProcessor):
    """transformer_lens' ``freq_penalty``: so much off a logit for each time its token stands there.

    The prompt's tokens count, as they do for a repetition penalty.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores ``[batch, d_vocab]`` after the penalty."""
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, input_ids, torch.ones(input_ids.shape, dtype=scores.dtype))
        return scores - self.penalty * counts


class Normalized(LogitsProcessor):
    """Log-probabilities, rounded as `torch.distributions.Categorical` does, which draws."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores ``[batch, d_vocab]``, normalized."""
        return scores - scores.logsumexp(dim=-1, keepdim=True)


def _asked(case: Case) -> dict[str, float]:
    """Options of a bridge's generate, of which any dtype makes what float32 makes of them.

    transformer_lens takes a quotient, a sum of probabilities and a penalty in the logits' dtype,
    Hugging Face in float32. Powers of two are exact in both.
    """
    seed, dtype = case.run.token_seed, case.model.dtype
    picked: dict[str, float] = {"temperature": (0.5, 2.0)[seed // 8 % 2]}
    if dtype == "float32":
        picked = {"temperature": (0.5, 0.7, 1.0, 1.6)[seed // 8 % 4]}
    wide = dtype in ("float32", "float64")
    unpadded = case.run.padding == "none"  # penalties-count-padding in known_defects.toml
    options: dict[str, tuple[bool, tuple[float, ...]]] = {
        "top_k": (True, (1, 2, 3)),
        "top_p": (wide, (0.3, 0.6, 0.9)),
        "repetition_penalty": (unpadded, (2.0,)),
        "freq_penalty": (unpadded and dtype == "float32", (4.0, 0.7)),
    }
    kinds = [name for name, (is_exact, _) in options.items() if is_exact]
    kind, draw = kinds[seed % len(kinds)], drawing(case)
    picked[kind] = options[kind][1][draw(len(options[kind][1]))]
    return picked


def _processors(asked: Mapping[str, float]) -> list[LogitsProcessor]:
    """Hugging Face's own processors of these options, in transformer_lens' order."""
    makers: dict[str, Any] = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "freq_penalty": FrequencyPenalty,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
    }
    return [*(make(asked[name]) for name, make in makers.items() if name in asked), Normalized()]


@check(
    "sampling.draws",
    "generate with do_sample, temperature, top_k, top_p, repetition_penalty or freq_penalty draws "
    "the tokens that Hugging Face's sampling draws from the same random state, and leaves the "
    "state that it leaves; generate_stream draws the same.",
    generating_cases,
    examples=0.35,
)
def draws(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The draws of dropout come in between, where a model in train mode has any."""
    data = inputs(case)
    asked: dict[str, Any] = _asked(case)
    theirs: dict[str, Any] = {"logits_processor": _processors(asked), "do_sample": True}
    if case.run.token_seed % 2:
        theirs |= {"eos_token_id": END, "pad_token_id": END}
        asked |= {"eos_token_id": END, "stop_at_eos": True}
    neutral: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    expected = by_hugging_face(case, data, **theirs, **neutral)
    actual = by_bridge(generating(case, adapter), case, data, do_sample=True, **asked)
    yield from differing_texts(expected, actual)
    if drawing(case)(2):  # a penalty that Hugging Face's processors would round otherwise
        asked["freq_penalty"] = 4.0
        expected = by_bridge(generating(case, adapter), case, data, do_sample=True, **asked)
    yield from differing_streams(expected, generating(case, adapter), case, do_sample=True, **asked)


# Named by what is special of them.
_WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "samples": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "num_return_sequences": 3,
    },
    "sampling beams": {"do_sample": True, "num_beams": 2},
    "records": {"do_sample": False, "output_attentions": True, "output_hidden_states": True},
}


_RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what generate returns, which nests tuples of them by step and layer."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)


def _ending_with(end: int) -> Any:
    """A tokenizer whose texts end with a token of this number."""
    return AutoTokenizer.from_pretrained(TRAINED, eos_token=by_hand().id_to_token(end))


def _own_mask(tokens: torch.Tensor, pad: int | None, ends: Any) -> torch.Tensor:
    """The mask ``[batch, pos]`` that Hugging Face makes of a model's pad, if it pads with no other.

    Args:
        tokens: The prompt, ``[batch, pos]``.
        pad: The model's own, if it has any.
        ends: That a text may end with: a pad that is one of these is no padding.
    """
    if pad is None or (ends is not None and pad in torch.tensor(ends).flatten()):
        return torch.ones_like(tokens)
    return tokens.ne(pad).long()


@check(
    "sampling.hugging_face",
    "hf_generate of tokens is Hugging Face's own generate: greedy, sampling several texts "
    "and by beams, with the records, the ends of text and the cache that are asked for, and no "
    "others; a tokenizer's end is the end and the pad where no other is given, and hides no "
    "padding; without a record it samples the same tokens, and the next numbers drawn are the "
    "same.",
    generating_cases,
    examples=0.5,
)
def hugging_face(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One way by the seed; the mask, the ends and the cache by it too. Most have a tokenizer."""
    data, seed, draw = inputs(case), case.run.token_seed, drawing(case)
    name = list(_WAYS)[seed % len(_WAYS)]
    given: dict[str, Any] = {
        "max_new_tokens": steps_of(case),
        "output_logits": True,
        "output_scores": True,
        **_WAYS[name],
    }
    if draw(3):
        given = {key: value for key, value in given.items() if key not in _RECORDS}
        given[_RECORDS[draw(len(_RECORDS))]] = True
    mask = data.attention_mask if draw(2) else None
    tokens, pad = data.tokens.clone(), case.model.pad_token_id
    if pad is not None and draw(4):
        tokens[0, 0] = pad
    if mask is None and case.model.dtype == "float64":
        # Left out, it would be that of the pad token, and a row that begins with one is NaN there.
        mask = torch.ones_like(tokens)
    if mask is not None:
        given["attention_mask"] = mask
    ends = ([], [END], [END, int(tokens[0, -1])], 0)[seed // 5 % 4]
    told: dict[str, Any] = {} if ends == [] else {"eos_token_id": ends}
    endless = not told and seed % 2 == 0
    truth = reference(case.model)
    subjects = {"a record": generating(case, adapter)}
    if given["do_sample"]:  # another, for dynamic RoPE remembers lengths
        subjects["no record"] = generating(case, adapter)
    if endless:  # the configuration has an end, which the call takes away
        for each in (truth, *subjects.values()):
            each.model.generation_config.eos_token_id = END
    theirs = {**told, "return_dict_in_generate": True, "use_cache": case.run.use_cache}
    theirs |= {"eos_token_id": None} if endless else {}
    if draw(3):
        end = draw(END + 1)
        for subject in subjects.values():
            bridge_of(subject).tokenizer = _ending_with(end)
        name += ", tokenizer"
        theirs = {"eos_token_id": end, **theirs}
        if draw(3) == 0:
            given["pad_token_id"] = draw(END + 1)
            name += ", pad"
        else:
            theirs["pad_token_id"] = end
            if mask is None:
                name += ", no mask"
                theirs["attention_mask"] = _own_mask(tokens, pad, theirs["eos_token_id"])
    model: Any = truth.model
    with from_the_seed(case, truth):
        expected = model.generate(tokens, **given, **theirs)
        random_state = torch.get_rng_state()
    outputs = {}
    for which, subject in subjects.items():
        if which == "no record":
            given = {key: value for key, value in given.items() if not key.startswith("output_")}
        with from_the_seed(case, subject), at_work(f"hf_generate, {name}, with {which}"):
            asked = {**told, "stop_at_eos": not endless, "use_past_kv_cache": case.run.use_cache}
            outputs[which] = bridge_of(subject).hf_generate(tokens, **given, **asked)
            left = torch.get_rng_state()
        yield from bitwise(f"{name}, {which}: random state", random_state, left)
    actual = outputs["a record"]
    if isinstance(actual, torch.Tensor):
        yield Gap(f"{name}: record", "contract", "the tokens are returned without one")
        return
    if "no record" in outputs:
        yield from bitwise(f"{name}: no record", expected.sequences, outputs["no record"])
    due, got = (
        dict(item for key in output for item in _tensors(key, output[key]))
        for output in (expected, actual)
    )
    for key in due:
        if key not in got:
            yield Gap(f"{name}: {key}", "missing", "not in what hf_generate returns")
        else:
            yield from bitwise(f"{name}: {key}", due[key], got[key])
            if got[key].requires_grad:
                yield Gap(f"{name}: {key}", "contract", "has a gradient")
    for key in got.keys() - due.keys():
        yield Gap(f"{name}: {key}", "extra", "Hugging Face returns no such thing")
    caches = expected.past_key_values, actual.past_key_values
    if [isinstance(cache, Cache) for cache in caches] != [case.run.use_cache] * 2:
        told_types = " and ".join(type(cache).__name__ for cache in caches)
        yield Gap(f"{name}: cache", "contract", f"{told_types}, use_cache={case.run.use_cache}")
    elif case.run.use_cache:
        yield from differing_caches(*caches)
