"""The ways to say the same call: by position, by name, under an older name, through a runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from conformance.checks.masks import masked_cases
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward
from conformance.compare import Gap, bitwise
from conformance.inputs import Inputs, derived_positions, inputs
from conformance.observe import started
from conformance.spec import Case
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.verdict import NotApplicable


def _differing(name: str, due: Any, got: Any) -> Iterator[Gap]:
    """The gaps between what two calls have returned: nothing, a tensor or several."""
    if due is None or got is None:
        if due is not got:
            yield Gap(name, "contract", f"returned a {type(got).__name__}")
    elif isinstance(due, torch.Tensor):
        yield from bitwise(name, due, got)
    else:
        for index, (one, other) in enumerate(zip(due, got, strict=True)):
            yield from bitwise(f"{name}[{index}]", one, other)


def _four_dimensional(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask of what each query may see, to be added to the scores."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _ways(
    bridge: Any, source: torch.Tensor, said: dict[str, Any], rest: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Calls that all mean ``bridge(source, **said, **rest)``."""
    kind, each, mask, labels = said.values()
    unsaid = {name: value for name, value in said.items() if name != "attention_mask"}
    passed = {name: value for name, value in said.items() if name != "return_type"}
    older = {"one_zero_attention_mask": mask}

    def cached() -> Any:
        return bridge.run_with_cache(source, False, False, "ln_final.hook_in", **said, **rest)[0]

    return {
        "by position": lambda: bridge(source, kind, each, None, None, mask, labels, **rest),
        "under older names": lambda: bridge(source, **unsaid, **older, **rest),
        "its input by name": lambda: bridge(input=source, **said, **rest),
        "in run_with_hooks": lambda: bridge.run_with_hooks(source, **said, **rest),
        "in run_with_hooks, by position": lambda: bridge.run_with_hooks(
            source, [], [], True, False, kind, **passed, **rest
        ),
        "in run_with_cache, by position": cached,
    }


@check(
    "calls.spelled",
    "What a call is given by position, under TransformerLens' older names, or by way of "
    "run_with_hooks and run_with_cache, on tokens and on embeddings, means what it means by name; "
    "loss_fn is the loss of a forward, and a mask of every query that of its tokens; one row of "
    "position_ids is every row's, and logits_to_keep the last ones, as it is to Hugging Face.",
    masked_cases,
    examples=0.3,
)
def spelled(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One return_type, by all the ways, on tokens or on their embeddings."""
    case = in_one_forward(case, training=False)
    data, draw = inputs(case), drawing(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, mask = bridge_of(subject).eval(), data.attention_mask
    if mask is None:
        raise NotApplicable("nothing is padded: there is no mask")
    embedded = bool(draw(2))
    truth = reference(case.model)
    words = truth.model.model.embed_tokens(data.tokens).detach()
    source = words if embedded else data.tokens
    said = {
        "return_type": ("logits", "loss", "both", None)[draw(4)],
        "loss_per_token": bool(draw(2)),
        "attention_mask": mask,
        "labels": data.tokens.flip(0) if embedded or draw(2) else None,
    }
    rest = {"use_cache": case.run.use_cache}
    with torch.no_grad(), started(subject, case):
        with at_work("a call by name"):
            due = bridge(source, **said, **rest)
        for name, call in _ways(bridge, source, said, rest).items():
            label = f"{said['return_type']} {name}, {'embeddings' if embedded else 'tokens'}"
            with at_work(label):
                got = call()
            yield from _differing(label, due, got)
        yield from _losses(bridge, data, each=bool(draw(2)))
        yield from _older_flag(bridge, data)
        positions = torch.tensor([[draw(case.model.max_position_embeddings) for _ in words[0]]])
        given = {**rest, "position_ids": positions, "logits_to_keep": draw(1 + case.run.seq_len)}
        yield from _one_row(truth, bridge, source, given, mask)


def _one_row(
    truth: Subject, bridge: Any, source: torch.Tensor, given: dict[str, Any], mask: torch.Tensor
) -> Iterator[Gap]:
    """The last logits of several rows at the positions of one, under a mask of theirs."""
    name = "inputs_embeds" if source.is_floating_point() else "input_ids"
    due = truth.model.train(False)(**{name: source}, attention_mask=mask, **given).logits
    with at_work("one row of positions"):
        got = bridge(source, attention_mask=mask, **given)
    yield from bitwise("logits, one row of positions", due, got)


def _losses(bridge: Any, data: Inputs, *, each: bool) -> Iterator[Gap]:
    """The loss of tokens by ``loss_fn``, and under a mask of every query."""
    mask = data.attention_mask
    assert mask is not None
    with at_work("a loss"):
        logits, due = bridge(
            data.tokens, return_type="both", loss_per_token=each, attention_mask=mask
        )
        got = bridge.loss_fn(logits, data.tokens, mask, each)
        wide = bridge(
            data.tokens,
            return_type="loss",
            loss_per_token=each,
            attention_mask=_four_dimensional(mask, logits.dtype),
            position_ids=derived_positions(mask),
        )
    yield from bitwise("loss_fn", due, got)
    yield from bitwise("loss under a mask of every query", due, wide)


def _older_flag(bridge: Any, data: Inputs) -> Iterator[Gap]:
    """A cache that is asked for by ``use_past_kv_cache``, where the configuration asks for none."""
    configuration = bridge.original_model.config
    before, configuration.use_cache = configuration.use_cache, False
    try:
        with at_work("use_past_kv_cache=True"):
            _, cache = bridge(
                data.tokens,
                return_type="logits_and_cache",
                attention_mask=data.attention_mask,
                use_past_kv_cache=True,
            )
    finally:
        configuration.use_cache = before
    length = 0 if cache is None else cache.get_seq_length()
    if length != data.tokens.shape[1]:
        told = f"the cache holds {length} tokens of {data.tokens.shape[1]}"
        yield Gap("use_past_kv_cache=True", "contract", told)
