"""The table of components and weights, and what runs one component, against known numbers."""

from __future__ import annotations

from typing import Any

import einops
import pytest
import torch
from hypothesis import find, settings
from torch import nn

from conformance.alone import Call, Drawer, run_alone
from conformance.checks.weights import shaped_cases
from conformance.parts import (
    accessors,
    columns_by_head,
    entries_by_head,
    parts,
    rows_by_head,
    stacked,
    weights,
)
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.subjects import reference

GROUPED = ModelSpec(
    hidden_size=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2
)


@pytest.mark.parametrize(
    ("split", "shape", "pattern"),
    [
        (rows_by_head, (12, 5), "(n h) m -> n m h"),
        (columns_by_head, (5, 12), "m (n h) -> n h m"),
        (entries_by_head, (12,), "(n h) -> n h"),
    ],
)
def test_heads_are_split_as_einops_splits_them(split: Any, shape: Any, pattern: str) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(split(tensor, 4), einops.rearrange(tensor, pattern, h=4))


def test_the_table_has_each_module_and_parameter_of_hugging_face_once() -> None:
    model = reference(ModelSpec(num_hidden_layers=2, biases=("q", "k", "v", "o"))).model
    modules = [part.module for part in parts(GROUPED)]
    own = {n for n, m in model.named_modules() if n and type(m) is not nn.ModuleList}
    assert set(modules) | {"model"} | {n for n in own if n.endswith("act_fn")} == own
    assert len(modules) == len(set(modules))
    names = [name for _, name, _ in accessors(GROUPED)]
    assert len(names) == len(set(names))
    assert set(dict(model.named_parameters())) <= set(names)


def test_shapes_and_absent_biases() -> None:
    found = weights(dict(reference(GROUPED).parameters), GROUPED)
    whole = {name: list(tensor.shape) for name, tensor in stacked(found, GROUPED).items()}
    assert whole["W_Q"] == [2, 4, 6, 8]
    assert whole["W_K"] == whole["W_V"] == [2, 2, 6, 8]
    assert whole["W_O"] == [2, 4, 8, 6]
    assert whole["W_in"] == whole["W_gate"] == [2, 6, 24]
    assert whole["W_out"] == [2, 24, 6]
    assert "b_Q" not in whole
    assert found["blocks.1.attn.b_Q"] is None
    assert found["unembed.b_U"] is not None
    assert not found["unembed.b_U"].any()


def test_a_tied_unembedding_is_the_embedding() -> None:
    model = ModelSpec(tie_word_embeddings=True)
    found = weights(dict(reference(model).parameters), model)
    embedding, unembedding = found["embed.W_E"], found["unembed.W_U"]
    assert embedding is not None
    assert unembedding is not None
    assert torch.equal(embedding.T, unembedding)


@pytest.mark.parametrize(
    "square",
    [
        lambda model: model.intermediate_size == model.hidden_size,
        lambda model: model.vocab_size == model.hidden_size,
        lambda model: model.num_attention_heads * model.d_head == model.hidden_size,
        lambda model: model.num_attention_heads == model.d_head,
        lambda model: (
            model.num_key_value_heads * model.d_head
            == model.hidden_size
            < model.num_attention_heads * model.d_head
        ),
    ],
)
def test_square_matrices_of_every_kind_are_drawn(square: Any) -> None:
    bound = settings(max_examples=500, derandomize=True, database=None)
    find(shaped_cases(), lambda case: square(case.model), settings=bound)


def test_running_alone_gives_outputs_and_gradients() -> None:
    linear = nn.Linear(3, 3)
    x = torch.randn(2, 1, 3)
    found = run_alone(linear, [Call((x,)), Call((x * 2,))], dict(linear.named_parameters()), seed=3)
    first, second = found["output 0 of call 0"], found["output 0 of call 1"]
    assert first is not None
    assert second is not None
    assert torch.equal(first, linear(x))
    assert torch.equal(second, linear(x * 2))
    bias, weight = found["gradient of bias"], found["gradient of weight"]
    assert bias is not None
    assert weight is not None
    draw = torch.Generator().manual_seed(3)
    probes = [torch.randn((2, 1, 3), generator=draw) for _ in range(2)]
    torch.testing.assert_close(bias, sum(probe.sum((0, 1)) for probe in probes))
    assert found["gradient of 0 of call 0"] is not None
    assert linear.weight.grad is None


def test_running_alone_leaves_the_random_state_and_repeats_itself() -> None:
    state, call = torch.get_rng_state(), Call((torch.randn(2, 3),))
    torch.set_rng_state(state)
    once, again = (
        run_alone(lambda x: x * torch.rand(()), [call], {}, seed=1)["output 0 of call 0"]
        for _ in range(2)
    )
    assert once is not None
    assert again is not None
    assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_query_sees_itself_and_nothing_later() -> None:
    seen = Drawer(Case(run=RunSpec(batch=3, seq_len=9))).seen()
    assert seen.diagonal(dim1=-2, dim2=-1).all()
    assert not seen.triu(1).any()
    assert not seen[..., 1:, 0].all()
