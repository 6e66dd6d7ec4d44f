"""The trained model is what its record says, and has learned something."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import adapter
from conformance.data import TRAINED, held_out, held_out_tokens, trained
from conformance.fields import SpecError
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import on_trained
from conformance.subjects import hf_model, reference

BOS = 0
in_checkout = pytest.mark.skipif(
    not (TRAINED.parent.parent / "training").is_dir(), reason="a wheel does not carry the training"
)


@cache
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TRAINED / "record.json").read_text(encoding="utf-8"))
    return found


def windows(length: int) -> torch.Tensor:
    """The held-out text as rows that begin with a BOS."""
    tokens = torch.tensor(held_out_tokens())
    rows = tokens[: len(tokens) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.nn.functional.pad(rows, (1, 0), value=BOS)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in TRAINED.iterdir()) < 2_000_000


def test_the_weights_are_the_recorded_ones() -> None:
    digest = hashlib.sha256()
    for name, parameter in hf_model(trained()).named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    assert digest.hexdigest() == record()["hashes"][str(record()["steps"])]


def test_it_has_learned() -> None:
    """A model that ignores the context cannot be below the entropy of the text's own unigrams."""
    tokens = torch.tensor(held_out_tokens())
    share = torch.bincount(tokens).double() / len(tokens)
    entropy = float(torch.special.entr(share).sum())
    rows = windows(trained().max_position_embeddings)
    with torch.no_grad():
        loss = float(hf_model(trained())(rows, labels=rows).loss)
    print(f"held-out loss {loss:.3f}, entropy of the held-out unigrams {entropy:.3f} nats")
    assert entropy == pytest.approx(record()["unigram_entropy"], abs=1e-6)
    assert loss == pytest.approx(record()["held_out_loss"], abs=1e-3)
    assert loss < 0.65 * entropy


def test_heads_are_found_by_their_pattern() -> None:
    """Of random tokens that are repeated; through the bridge, as a researcher would find them."""
    bridge = adapter.bridge(hf_model(trained()))
    period = 20
    draw = torch.Generator().manual_seed(3)
    once = torch.randint(2, trained().vocab_size, (8, period), generator=draw)
    rows = torch.nn.functional.pad(once.repeat(1, 2), (1, 0), value=BOS)
    _, seen = bridge.run_with_cache(rows)
    found: dict[str, list[str]] = {"previous": [], "induction": []}
    for layer in range(trained().num_hidden_layers):
        pattern = seen[f"blocks.{layer}.attn.hook_pattern"]
        for kind, back in (("previous", 1), ("induction", period - 1)):
            # In the repetition: from each token to the one so far back.
            looks = pattern[:, :, period + 1 :].diagonal(period + 1 - back, 2, 3).mean((0, 2))
            found[kind] += [f"{layer}.{head}" for head in range(len(looks)) if looks[head] > 0.5]
    assert found["previous"]
    assert found["induction"]
    assert found["previous"] < found["induction"]  # an earlier layer finds what a later one uses


def test_the_clip_binds_and_matters() -> None:
    shares = [layer[letter] for layer in record()["clipped"] for letter in "qk"]
    assert 0.01 < sum(shares) / len(shares) < 0.1
    rows = windows(trained().max_position_embeddings)[:20]
    with torch.no_grad():
        clipped, unclipped = (
            float(hf_model(model)(rows, labels=rows).loss)
            for model in (trained(), trained().without_clip())
        )
    assert abs(clipped - unclipped) > 0.01


def test_the_tokenizer_is_of_olmos_kind() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    assert type(tokenizer).__name__.startswith("GPTNeoXTokenizer")
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 0, 1)
    assert len(tokenizer) == trained().vocab_size
    assert tokenizer.encode(held_out()) == list(held_out_tokens())
    assert tokenizer.decode(list(held_out_tokens())) == held_out()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_spec_is_that_model_in_any_dtype(dtype: str) -> None:
    parameters = dict(hf_model(trained(dtype)).named_parameters())
    for name, tensor in load_file(TRAINED / "model.safetensors").items():
        assert torch.equal(parameters[name], tensor.to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 48}, "model.embed_tokens.weight"),
        ({"biases": ("q",)}, "model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
        ({"num_hidden_layers": 2}, "model.layers.2.mlp.up_proj.weight"),
    ],
)
def test_a_spec_of_other_sizes_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match="weights='trained'") as caught:
        reference(replace(trained(), **change))
    assert named in caught.value.allowed


def test_any_case_can_be_put_on_it() -> None:
    drawn = ModelSpec(dtype="bfloat16", attention_dropout=0.1, max_position_embeddings=32)
    run = RunSpec(batch=3, seq_len=7, token_seed=2**18)
    case = on_trained(Case(model=drawn, run=run))
    assert case.run == run
    assert case.model == replace(trained("bfloat16"), attention_dropout=0.1)
    text = held_out_tokens()
    for row in case.tokens:
        assert row in [text[start : start + 7] for start in range(len(text))]


@in_checkout
def test_the_readme_and_the_picture_are_those_of_the_record() -> None:
    from training import corpus, report

    assert (TRAINED / "README.md").read_text(encoding="utf-8") == report.readme(record())
    assert (TRAINED / "loss.svg").read_text(encoding="utf-8") == report.curve(record())
    assert held_out() == corpus.split()[1]


@in_checkout
def test_the_first_steps_are_the_recorded_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, or the script says which versions differ."""
    from training.__main__ import EARLY, main

    steps = EARLY[1]
    status = main(["--until", str(steps)])
    said = capsys.readouterr().out
    if "other versions" in said:
        assert status == 1
        pytest.skip(said.splitlines()[-1])
    assert status == 0, said
    assert f"bit for bit the recorded weights, after 1 and {steps} steps" in said


@in_checkout
def test_what_differs_is_said() -> None:
    from training.__main__ import difference

    made = {"hashes": {"1": "a"}, "versions": {"torch": "2", "vectors": "AVX512"}}
    assert difference(made, made) == ""
    other = {**made, "hashes": {"1": "b"}}
    assert "after step 1, although all versions are the same" in difference(other, made)
    older = {**other, "versions": {"torch": "1", "vectors": "AVX512"}}
    assert "other versions: torch 2 (recorded: 1)" in difference(older, made)
    assert "no hash is recorded" in difference({**made, "hashes": {}}, made)
