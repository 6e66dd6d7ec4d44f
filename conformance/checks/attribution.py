"""Gradient attribution: what an activation would change, to first order, by its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, sites_to_hook
from conformance.checks.sweeps import analysed_cases, logit_difference, pair
from conformance.compare import Gap, bitwise
from conformance.inputs import Inputs
from conformance.observe import observe
from conformance.recorder import Observation
from conformance.sites import Site
from conformance.spec import Case
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.verdict import NotApplicable

Metric = Callable[[torch.Tensor], torch.Tensor]


def _towards(metric: Metric, data: Inputs, case: Case) -> Inputs:
    """The same inputs, with a metric's own gradient by the logits as what is sent back."""
    shape = (*data.tokens.shape, case.model.vocab_size)
    logits = torch.zeros(shape, dtype=getattr(torch, case.model.dtype), requires_grad=True)
    (gradient,) = torch.autograd.grad(metric(logits), logits)
    return replace(data, probe=gradient)


def _names(every: Mapping[str, Site], case: Case) -> dict[str, str]:
    """What each site is called when it is asked for: half of the aliases, by turns."""
    odd = case.run.token_seed & 1
    return {
        name: site.aliases[-1] if site.aliases and (index & 1) == odd else name
        for index, (name, site) in enumerate(every.items())
    }


def _backed(
    bridge: Any, tokens: torch.Tensor, metric: Metric, names: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Activations and gradients by canonical name, as hooks of a bridge see them."""
    values: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}

    def keep(into: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
        def hook(tensor: torch.Tensor, hook: Any) -> None:
            into[name] = tensor.detach().clone()

        return hook

    forwards = [(asked, keep(values, name)) for name, asked in names.items()]
    backwards = [(asked, keep(gradients, name)) for name, asked in names.items()]
    try:
        with bridge.hooks(fwd_hooks=forwards, bwd_hooks=backwards):
            metric(bridge(tokens)).backward()  # type: ignore[no-untyped-call]
    finally:
        bridge.zero_grad(set_to_none=True)
    return values, gradients


@check(
    "attribution.gradients",
    "Activation times gradient, and the clean activation's difference times gradient, of a logit "
    "difference, by backward hooks under canonical names and aliases, are those of Hugging Face "
    "at every site.",
    analysed_cases,
    examples=0.4,
)
def gradients(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A clean run that is cached, and a corrupted one with hooks both ways at all sites."""
    clean_case, clean, corrupted = pair(case)
    truth, subject = reference(case.model), bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, metric = bridge_of(subject), logit_difference(case)
    every = sites_to_hook(subject, case)
    names = _names(every, case)
    due = observe(truth, case, sites=every, data=_towards(metric, corrupted, case))
    due_clean = observe(truth, clean_case, sites=every, backward=False, data=clean).values
    with at_work("run_with_cache"):
        _, cache = bridge.run_with_cache(clean.tokens)
        got_clean = {name: cache[asked] for name, asked in names.items()}
    with at_work("hooks both ways"):
        values, backs = _backed(bridge, corrupted.tokens, metric, names)
    for name, asked in names.items():
        wanted, got = due.gradients.get(name), backs.get(name)
        if wanted is None or got is None:
            if wanted is not got:
                kind = "missing" if got is None else "extra"
                yield Gap(asked, kind, f"{'no' if got is None else 'a'} gradient")
            continue
        if name not in values:
            yield Gap(asked, "missing", "never fired")
            continue
        yield from bitwise(
            f"activation x gradient of {asked}", due.values[name] * wanted, values[name] * got
        )
        yield from bitwise(
            f"(clean - corrupted) x gradient of {asked}",
            (due_clean[name] - due.values[name]) * wanted,
            (got_clean[name].detach() - values[name]) * got,
        )


# What `attribution_patch` scores, by its own word for it: (site, per layer, per head).
_NODES = {
    "embed": ("embed.hook_out", False, False),
    "attn_head_out": ("blocks.{i}.attn.o.hook_in", True, True),
    "mlp_out": ("blocks.{i}.mlp.hook_out", True, False),
}
Key = tuple[str, int, int | None, int | None]


def _scores(clean: Observation, corrupted: Observation, case: Case) -> dict[Key, float]:
    """The first-order effect of each node of one pair of prompts."""
    scores: dict[Key, float] = {}
    for kind, (row, layered, headed) in _NODES.items():
        for layer in range(case.model.num_hidden_layers) if layered else (None,):
            name = row.replace("{i}", str(layer))
            effect = (clean.values[name] - corrupted.values[name]) * corrupted.gradients[name]
            for position in range(case.run.seq_len):
                for head in range(effect.shape[2]) if headed else (None,):
                    at = effect[0, position] if head is None else effect[0, position, head]
                    scores[kind, position, layer, head] = float(at.sum())
    return scores


def _row(data: Inputs, row: int) -> Inputs:
    return replace(data, tokens=data.tokens[row : row + 1])


def _means(truth: Subject, case: Case, metric: Metric) -> dict[Key, float]:
    """The scores by hand: pair by pair, then averaged."""
    clean_case, clean, corrupted = pair(case)
    every = sites_to_hook(truth, case)
    totals: dict[Key, float] = {}
    for row in range(case.run.batch):
        before = _row(clean, row)
        after = _towards(metric, _row(corrupted, row), case)
        first = observe(truth, clean_case, sites=every, backward=False, data=before)
        second = observe(truth, case, sites=every, data=after)
        for key, score in _scores(first, second, case).items():
            totals[key] = totals.get(key, 0.0) + score
    return {key: total / case.run.batch for key, total in totals.items()}


@check(
    "attribution.patching",
    "attribution_patch scores the embedding, each head and each MLP at each position as the "
    "difference of Hugging Face's clean and corrupted activations times its gradient.",
    analysed_cases,
    examples=0.2,
)
def attribution_patching(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The mean over the pairs of prompts, each of which is run alone."""
    try:
        from transformer_lens.tools.analysis.attribution_patching import attribution_patch
    except ImportError:
        raise NotApplicable("this transformer_lens has no attribution_patch") from None
    _, clean, corrupted = pair(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    metric = logit_difference(case)
    due = _means(reference(case.model), case, metric)
    with at_work("attribution_patch"):
        result = attribution_patch(bridge_of(subject), clean.tokens, corrupted.tokens, metric)
        got: dict[Key, float] = {
            (node.kind, node.position, node.layer, node.head): score
            for node, score in result.node_scores.items()
        }
    for kind, position, layer, head in dict.fromkeys([*due, *got]):
        key = kind, position, layer, head
        name = f"{kind}, layer {layer}, head {head}, position {position}"
        if key not in due or key not in got:
            yield Gap(name, "extra" if key in got else "missing", "a node's score")
        else:
            wanted, found = (torch.tensor(x[key], dtype=torch.float64) for x in (due, got))
            yield from bitwise(name, wanted, found)
