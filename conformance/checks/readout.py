"""What is read out of the residual stream: each layer's logits, and each part's share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of
from conformance.checks.sweeps import analysed_cases, plain_runs
from conformance.compare import Gap, bitwise, within
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.spec import Case
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import (
    Allowance,
    of_attribution,
    of_processed_attribution,
    of_product,
)
from conformance.verdict import NotApplicable


def _streams(truth: Subject, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The residual stream before each layer and, normalized already, after the last; the logits."""
    with torch.no_grad():
        said: Any = truth.model(tokens, output_hidden_states=True)
    return list(said.hidden_states), said.logits


@check(
    "readout.layers",
    "Each layer's residual stream, cached and read through the bridge's final norm and "
    "unembedding, gives the logits of Hugging Face's hidden state through its own norm and head, "
    "bit for bit; logit_lens gives them too.",
    analysed_cases,
    examples=0.4,
)
def layers(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """From the embedding to the last layer, whose reading is the model's own logits."""
    truth, subject = reference(case.model), bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, tokens = bridge_of(subject), inputs(case).tokens
    hidden, logits = _streams(truth, tokens)
    body = truth.model.model
    with torch.no_grad():
        normed = [*(body.norm(stream) for stream in hidden[:-1]), hidden[-1]]
        due = [truth.model.lm_head(each) for each in normed]
    n_layers = case.model.num_hidden_layers
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    names.append(f"blocks.{n_layers - 1}.hook_resid_post")
    with torch.no_grad(), at_work("reading the layers out"):
        said, cache = bridge.run_with_cache(tokens)
        got = [bridge.unembed(bridge.ln_final(cache[name])) for name in names]
    yield from bitwise("logits", logits, said)
    for name, wanted, found in zip(names, due, got, strict=True):
        yield from bitwise(f"{name} through ln_final and unembed", wanted, found)
    yield from _lens(bridge, tokens, truth, normed)


def _lens(
    bridge: Any, tokens: torch.Tensor, truth: Subject, normed: Sequence[torch.Tensor]
) -> Iterator[Gap]:
    """The same by transformer_lens' own tool, which multiplies by W_U in chunks of rows."""
    try:
        from transformer_lens.tools.analysis.logit_lens import logit_lens
    except ImportError:  # releases before it
        return
    with at_work("logit_lens"):
        read = logit_lens(bridge, tokens, positions=None).readout.values
    weight = truth.model.lm_head.weight.detach()
    for index, state in enumerate(normed):
        left, right = state.double(), weight.double().T
        allowance = of_product(left, right, weight.dtype)
        due = (left @ right).to(weight.dtype)
        yield from within(allowance, f"logit_lens, entry {index}", due, read[index])
    if len(read) != len(normed):
        yield Gap("logit_lens", "count", f"{len(read)} readings instead of {len(normed)}")


def _directed(
    piece: torch.Tensor, scale: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part's share of a logit difference ``[batch, pos]``, and the sum of its terms' sizes."""
    share = ((piece - piece.mean(-1, keepdim=True)) / scale) @ (right - wrong)
    size = ((piece.abs() + piece.abs().mean(-1, keepdim=True)) / scale) @ (
        right.abs() + wrong.abs()
    )
    return share, size


def _pieces(
    seen: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], case: Case
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All that is written to the residual stream ``[batch, pos, d_model]``, whole and by head."""
    whole = {"embed": seen["embed.hook_out"].double()}
    heads: dict[str, torch.Tensor] = {}
    for layer in range(case.model.num_hidden_layers):
        block = f"blocks.{layer}"
        whole[f"{layer}_attn_out"] = seen[f"{block}.attn.hook_out"].double()
        whole[f"{layer}_mlp_out"] = seen[f"{block}.mlp.hook_out"].double()
        z = seen[f"{block}.attn.o.hook_in"].double()
        out = weights[f"model.layers.{layer}.self_attn.o_proj.weight"].detach().double()
        for head, columns in enumerate(torch.split(out, z.shape[-1], dim=1)):
            heads[f"L{layer}H{head}"] = z[:, :, head] @ columns.T
    return whole, heads


def _pair_of_tokens(case: Case) -> tuple[int, int]:
    """A drawn token, and another."""
    vocabulary, seed = case.model.vocab_size, case.run.token_seed
    right = seed % vocabulary
    return right, (right + 1 + seed // vocabulary % (vocabulary - 1)) % vocabulary


@dataclass(frozen=True)
class _Due:
    """What Hugging Face's tensors and weights say of a logit difference, in float64.

    Attributes:
        difference: The difference itself, ``[batch, pos]``.
        whole: By layer: the share of each part, and the sum of the sizes of its terms.
        heads: The same by head, with all the rest as the remainder.
    """

    difference: torch.Tensor
    whole: dict[str, tuple[torch.Tensor, torch.Tensor]]
    heads: dict[str, tuple[torch.Tensor, torch.Tensor]]


def _by_hand(case: Case) -> _Due:
    truth, data = reference(case.model), inputs(case)
    right, wrong = _pair_of_tokens(case)
    expected = observe(truth, case, sites=sites_of(truth, case), backward=False, data=data)
    directions = truth.model.lm_head.weight.detach().double()
    scale = expected.values["ln_final.hook_scale"].double()
    whole, heads = (
        {
            label: _directed(piece, scale, directions[right], directions[wrong])
            for label, piece in pieces.items()
        }
        for pieces in _pieces(expected.values, truth.parameters, case)
    )
    share = torch.stack([each for each, _ in whole.values()]).sum(0)
    size = _total(whole | heads)
    rest = share - torch.stack([each for each, _ in heads.values()]).sum(0)
    logits = expected.logits.double()
    return _Due(
        logits[..., right] - logits[..., wrong], whole, {**heads, "remainder": (rest, size)}
    )


def _total(parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The sum of the sizes of all parts."""
    return torch.stack([size for _, size in parts.values()]).sum(0)


def _share_gaps(
    way: str,
    labels: Sequence[str],
    got: torch.Tensor,
    due: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    allow: Callable[[torch.Tensor], Allowance],
) -> Iterator[Gap]:
    """Gaps of all shares, ``[part, batch, pos]``; an allowance is made from a size."""
    if list(labels) != list(due):
        yield Gap(way, "contract", f"labels are {labels}, not {list(due)}")
        return
    for (label, (share, size)), found in zip(due.items(), got.double(), strict=True):
        yield from within(allow(size), f"{way}: {label}", share, found)


@check(
    "readout.attribution",
    "Direct logit attribution gives the embedding, each layer's attention and MLP, and each head "
    "its share of a logit difference as Hugging Face's tensors and weights have it, and the "
    "shares sum to Hugging Face's own difference.",
    analysed_cases,
    examples=0.4,
)
def attribution(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Of two drawn tokens, at every position, by the cache of a bridge as it is."""
    due, dtype = _by_hand(case), getattr(torch, case.model.dtype)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    right, wrong = _pair_of_tokens(case)
    with torch.no_grad(), at_work("direct logit attribution"):
        _, cache = bridge_of(subject).run_with_cache(inputs(case).tokens)
        stacks = {
            "decompose_resid": cache.decompose_resid(return_labels=True),
            "stack_head_results": cache.stack_head_results(incl_remainder=True, return_labels=True),
        }
        shares = {
            way: cache.logit_attrs(stack, tokens=right, incorrect_tokens=wrong)
            for way, (stack, _) in stacks.items()
        }
    # The final norm's scale has the precision of float32 at the most.
    allow = partial(of_attribution, dtype=torch.float32 if dtype == torch.float64 else dtype)
    for way, parts in zip(stacks, (due.whole, due.heads), strict=True):
        share, labels = shares[way], stacks[way][1]
        yield from _share_gaps(way, labels, share, parts, allow)
        summed = share.double().sum(0)
        yield from within(allow(_total(parts)), f"{way}: the sum", due.difference, summed)


def wide_analysed_cases() -> SearchStrategy[Case]:
    """As `analysed_cases`, in float32 and float64, whose weights can be processed."""
    dtypes = st.sampled_from(("float32", "float32", "float64"))
    return cases(models=model_specs(layers=st.sampled_from((2, 1)), dtypes=dtypes), runs=plain_runs)


@check(
    "readout.processed",
    "In compatibility mode, whose weights are folded and centered, direct_logit_attribution still "
    "gives each layer's attention and MLP the share that Hugging Face's have, and its shares, by "
    "layer and by head, sum to Hugging Face's logit difference.",
    wide_analysed_cases,
    examples=0.15,
)
def processed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A head's own share may change: what the values' biases add goes into the remainder."""
    try:
        from transformer_lens.tools.analysis.direct_logit_attribution import (
            direct_logit_attribution,
        )
    except ImportError:
        raise NotApplicable("this transformer_lens has no direct_logit_attribution") from None
    due = _by_hand(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, tokens = bridge_of(subject), inputs(case).tokens
    right, wrong = _pair_of_tokens(case)
    with torch.no_grad(), at_work("direct_logit_attribution"):
        bridge.enable_compatibility_mode(disable_warnings=True)
        whole, heads = (
            direct_logit_attribution(bridge, tokens, right, wrong, unit=unit, pos=None)
            for unit in ("component", "head")
        )
    allowance = of_processed_attribution(_total(due.heads))
    yield from _share_gaps(
        "by layer", whole.labels, whole.attribution, due.whole, lambda size: allowance
    )
    for way, got in (("by layer", whole), ("by head", heads)):
        summed = got.attribution.double().sum(0)
        yield from within(allowance, f"{way}: the sum", due.difference, summed)
