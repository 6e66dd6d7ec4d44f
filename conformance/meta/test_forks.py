"""A reference led through copies is the reference, and an edit of one head is one head's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conformance.compare import compare_tensors
from conformance.edits import edited_head
from conformance.forks import Forks
from conformance.observe import observe
from conformance.recorder import Observation
from conformance.sites import POST_CLIP, behind_flags, observable
from conformance.spec import Case, Edit, ModelSpec, RunSpec
from conformance.subjects import reference
from conformance.tolerance import of_sum

torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other

MODEL = ModelSpec(
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    biases=("q", "v", "o"),
    clip_qkv=0.8,
    weight_seed=4,
)
SPLIT = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
TOGETHER = ("use_attn_result", "use_attn_in")
SEED = 4 * 3 + 1  # of an edit of head 3


def case(flags: tuple[str, ...], *edits: Edit) -> Case:
    return Case(
        model=MODEL, run=RunSpec(batch=2, seq_len=5, token_seed=3, flags=flags, edits=edits)
    )


def plain() -> Observation:
    return observe(reference(MODEL), case(()), sites=observable(MODEL))


def led(its: Case, seen: Observation | None = None, *, exact: bool = False) -> Observation:
    subject = reference(MODEL)
    forks = Forks(its, subject, seen, exact=exact, everywhere=not exact)
    bare = replace(its, run=replace(its.run, edits=()))
    return observe(subject, bare, sites=observable(MODEL, POST_CLIP), recorder=forks)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other)


@pytest.mark.parametrize("flags", [SPLIT, TOGETHER])
def test_copies_that_nobody_edits_change_nothing_but_rounding(flags: tuple[str, ...]) -> None:
    due, got = plain(), led(case(flags))
    torch.testing.assert_close(got.logits, due.logits, rtol=1e-4, atol=1e-5)
    for name, gradient in due.parameter_gradients.items():
        torch.testing.assert_close(got.parameter_gradients[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [SPLIT, TOGETHER])
def test_every_site_behind_a_flag_is_shown(flags: tuple[str, ...]) -> None:
    got = led(case(flags))
    gates = behind_flags(MODEL, flags)
    assert gates.keys() <= got.values.keys()
    assert gates.keys() <= got.gradients.keys()
    residual = got.values["blocks.1.ln1.hook_in"]
    for name in gates:
        if name.startswith("blocks.1") and "input" in name:
            assert same(got.values[name], residual.unsqueeze(2).expand_as(got.values[name]))


def test_results_and_the_bias_add_up_to_the_output() -> None:
    got, subject = led(case(SPLIT)), reference(MODEL)
    bias = subject.parameters["model.layers.0.self_attn.o_proj.bias"]
    total = got.values["blocks.0.attn.hook_result"].sum(2) + bias
    torch.testing.assert_close(total, plain().values["blocks.0.attn.o.hook_out"])


@pytest.mark.parametrize("flags", [SPLIT, TOGETHER])
def test_gradients_of_the_copies_add_up_to_that_of_the_residual(flags: tuple[str, ...]) -> None:
    got = led(case(flags))
    gates = [name for name in behind_flags(MODEL, flags) if "attn.hook_" in name]
    inputs = [name for name in gates if name.startswith("blocks.1") and "result" not in name]
    total = sum(got.gradients[name].sum(2) for name in inputs)
    due = plain().gradients["blocks.1.ln1.hook_in"]
    torch.testing.assert_close(total, due, rtol=1e-3, atol=1e-5)


def test_an_edit_of_one_head_reaches_that_head_only() -> None:
    edit = Edit(site="blocks.0.attn.hook_q_input", kind="replace", seed=SEED)
    due, got = plain(), led(case(SPLIT, edit), exact=True)
    for letter, touched in (("q", [3]), ("k", []), ("v", [])):
        name = f"blocks.0.attn.{letter}.hook_out"
        for head in range(due.values[name].shape[2]):
            equal = same(due.values[name][:, :, head], got.values[name][:, :, head])
            assert equal == (head not in touched), (name, head)


def test_a_key_value_head_reads_the_mean_of_its_group() -> None:
    edit = Edit(site="blocks.0.attn.hook_attn_in", kind="zero", seed=SEED)
    due, got = plain(), led(case(TOGETHER, edit), exact=True)
    weight = reference(MODEL).parameters["model.layers.0.self_attn.k_proj.weight"]
    normed = due.values["blocks.0.ln1.hook_out"]
    # Of the copies 2 and 3, one is zero now, and the LayerNorm of zeros is zero.
    key = normed / 2 @ weight.view(2, 6, -1)[1].T
    name = "blocks.0.attn.k.hook_out"
    torch.testing.assert_close(got.values[name][:, :, 1], key)
    assert same(got.values[name][:, :, 0], due.values[name][:, :, 0])


def test_it_goes_on_with_what_the_bridge_showed() -> None:
    name = "blocks.0.attn.q.hook_out"
    its = case(SPLIT)
    alone = led(its)
    shown = alone.values[name] + 1
    sent = torch.ones_like(alone.gradients["blocks.0.hook_in"])
    seen = replace(
        alone,
        values={**alone.values, name: shown},
        gradients={**alone.gradients, "blocks.0.hook_in": sent},
    )
    got = led(its, seen)
    torch.testing.assert_close(got.values[name], alone.values[name])  # what is due
    clipped = got.values["blocks.0.attn.hook_q_clipped"]
    assert same(clipped, shown.clamp(-0.8, 0.8))
    assert same(got.gradients["embed.hook_out"], sent)


@pytest.mark.parametrize("kind", ["zero", "scale", "noise", "replace", "one_position", "one_row"])
def test_an_edited_head_is_the_drawn_one(kind: str) -> None:
    tensor = torch.rand(2, 3, 4, 5, requires_grad=True)
    new = edited_head(Edit(site="any", kind=kind, seed=SEED), tensor)
    assert (new != tensor).flatten(3).any(-1).any(0).any(0).tolist() == [False] * 3 + [True]
    (gradient,) = torch.autograd.grad(new.sum(), tensor)  # it goes on, if only as zeros
    assert gradient.shape == tensor.shape
    every = edited_head(Edit(site="any", kind="noise", seed=SEED - 1), tensor)
    assert bool((every != tensor).all())
    whole = edited_head(Edit(site="any", kind="noise", seed=SEED), tensor[:, :, 0])
    assert bool((whole != tensor[:, :, 0]).all())


def test_a_sum_s_allowance_grows_with_what_is_added_up() -> None:
    terms = torch.randn(64, generator=torch.Generator().manual_seed(0))
    forwards, backwards = terms.cumsum(0)[-1], terms.flip(0).cumsum(0)[-1]
    allowance = of_sum(torch.float32, float(terms.abs().sum()))
    assert compare_tensors("sum", forwards, backwards, allowance) is None
    lost = forwards - terms[5] * 1e-4
    assert compare_tensors("sum", forwards, lost, allowance) is not None
    assert (
        of_sum(torch.float64, 1.0).atol < 1e-15 < of_sum(torch.float64, 1.0, through_norm=True).atol
    )
