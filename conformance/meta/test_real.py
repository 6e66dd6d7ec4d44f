"""A real checkpoint is judged as strictly as a drawn one; refusals come before the load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import LlamaConfig, LlamaForCausalLM, OlmoForCausalLM

from adapter import OlmoArchitectureAdapter
from conformance import checkpoint, cli, real
from conformance.checkpoint import Checkpoint, find, tokens_of
from conformance.fields import SpecError
from conformance.mutants import CATALOGUE
from conformance.real import Report, judge_model
from conformance.spec import ModelSpec
from conformance.subjects import hf_model
from conformance.tolerance import Allowance
from conformance.witness import SAMPLE, SMALL, Witness, digest

torch.set_num_threads(1)

ODD = ModelSpec(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    clip_qkv=0.7,
    biases=("q", "v"),
    weight_seed=3,
)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model(ODD).save_pretrained(folder)
    return folder


def judged(tmp_path: Path, adapter: Any = OlmoArchitectureAdapter, **options: Any) -> Report:
    model = hf_model(ODD)
    model.requires_grad_(False)
    return judge_model(model, adapter, TOKENS, tmp_path, **options)


def gaps(report: Report) -> list[str]:
    return [str(gap) for found in report.gaps.values() for gap in found]


@pytest.mark.parametrize("gradients", ["none", "slice", "all"])
def test_the_sound_adapter_conforms(tmp_path: Path, gradients: str) -> None:
    layers: list[tuple[str, int]] = []
    report = judged(tmp_path, gradients=gradients, on_layer=lambda *told: layers.append(told))
    assert gaps(report) == []
    assert report.complete == ["patched", "bridged"]
    assert layers == [(name, n) for name in ("reference", "patched", "bridged") for n in (1, 2)]
    model = OlmoForCausalLM(hf_model(ODD).config)
    parameters = len(list(model.parameters())) - 4 if gradients == "all" else 0  # biases q, v only
    assert report.judged["bridged"] >= 60 + parameters
    assert (report.judged["bridged"] > 100) == (gradients != "none")


@pytest.mark.parametrize(
    "mutant",
    [
        "clamp.in_place",
        "nudged.blocks.{i}.mlp.hook_out",
        "steeper.blocks.{i}.attn.q.hook_out",
        "silent.unembed.hook_out",
        "hooks.extra",
        "patch.detached_clone",
    ],
)
def test_a_broken_bridge_does_not(tmp_path: Path, mutant: str) -> None:
    from conformance.subjects import SubjectError

    with CATALOGUE[mutant].apply():
        try:
            found = gaps(judged(tmp_path))
        except SubjectError as error:
            found = [str(error)]
    assert found, mutant


def test_a_gradient_of_a_parameter_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only a sample of it is kept."""
    monkeypatch.setattr("conformance.witness.SAMPLE", 7)
    model = hf_model(ODD)
    model.requires_grad_(False)
    shown = real._run_bridged

    def spoilt(judged: Any, bridge: Any, parameters: Any, at: Any, watch: Any) -> Any:
        def wrong(kind: str, name: str, tensor: torch.Tensor) -> None:
            if kind == "parameter" and name.endswith("0.mlp.up_proj.weight"):
                tensor = tensor.clone()
                tensor[1, 1] += 1e-6
            watch(kind, name, tensor)

        return shown(judged, bridge, parameters, at, wrong)

    monkeypatch.setattr(real, "_run_bridged", spoilt)
    report = judge_model(model, OlmoArchitectureAdapter, TOKENS, tmp_path)
    assert [gap.site for gap in report.gaps["bridged"]] == ["model.layers.0.mlp.up_proj.weight"]
    assert "entries differ" in gaps(report)[0]


def test_what_never_comes_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.Judged, "trained", lambda self: {})
    report = judged(tmp_path)
    assert gaps(report) == []  # nothing is asked for on either side

    whole = hf_model(ODD)
    whole.requires_grad_(False)
    witness = Witness(tmp_path)
    witness.keep("parameter x", torch.ones(2))
    compared = real._Comparison("bridged", witness, {}, report)
    compared.finish()
    assert [str(gap) for gap in report.gaps["bridged"]] == ["x: missing: parameter: never came"]


def test_an_interrupted_run_leaves_a_report(tmp_path: Path) -> None:
    report = Report()

    def stop(subject: str, layer: int) -> None:
        if subject == "bridged":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path, report=report, on_layer=stop)
    assert report.complete == ["patched"]
    assert 20 < report.judged["bridged"] < report.judged["patched"]


class TestWitness:
    def test_a_digest_is_of_every_bit(self) -> None:
        x = torch.randn(5, 4)
        other = x.clone()
        other[2, 3] = torch.nextafter(other[2, 3], torch.tensor(10.0))
        told = {
            digest(x),
            digest(other),
            digest(x.reshape(4, 5)),
            digest(x.double()),
            digest(x.bfloat16()),
        }
        assert len(told) == 5
        assert digest(x) == digest(x.clone()) == digest(x.T.contiguous().T)
        assert digest(torch.tensor([0.0])) == digest(torch.tensor([-0.0]))

    @pytest.mark.parametrize("size", [4, SMALL])
    def test_tensors_are_kept_in_memory_or_on_disk(self, tmp_path: Path, size: int) -> None:
        witness, x = Witness(tmp_path), torch.arange(size, dtype=torch.float32)
        witness.keep("x", x)
        assert bool(list(tmp_path.iterdir())) == (size == SMALL)
        assert torch.equal(witness.kept("x"), x)
        exact = {"kind": "value", "derived": False}
        assert witness.gap("x", x, lambda: None, **exact) is None  # type: ignore[arg-type]
        wrong = x.clone()
        wrong[-1] += 1
        gap = witness.gap("x", wrong, lambda: None, **exact)  # type: ignore[arg-type]
        assert gap is not None
        assert gap.index == (size - 1,)
        near = lambda: Allowance(0.0, 2.0, "so far")  # noqa: E731
        assert witness.gap("x", wrong, near, **exact) is None  # type: ignore[arg-type]
        assert witness.difference("x", wrong) == 1.0

    def test_a_sample_reaches_from_end_to_end(self, tmp_path: Path) -> None:
        witness, x = Witness(tmp_path), torch.zeros(3, SAMPLE)
        witness.keep("x", x, whole=False)
        for index in (0, x.numel() - 1):
            wrong = x.clone()
            wrong.view(-1)[index] = 1.0
            gap = witness.gap("x", wrong, lambda: None, kind="gradient", derived=False)
            assert gap is not None
            assert gap.greatest == 1.0


class TestFinding:
    def test_a_checkpoint_is_loaded_as_it_is(self, saved: Path) -> None:
        found = find(str(saved), dtype=None, device="cpu")
        assert found.dtype == torch.float32
        model = found.load()
        assert not model.training
        assert model.config._attn_implementation == "eager"
        due = dict(hf_model(ODD).named_parameters())
        assert found.weight_bytes == 4 * sum(p.numel() for p in due.values()) + 4 * 2 * (8 + 24)
        for name, parameter in model.named_parameters():
            if name in due:
                assert torch.equal(parameter, due[name])
        half = find(str(saved), dtype="bfloat16", device="cpu")
        assert half.load().lm_head.weight.dtype == torch.bfloat16
        assert half.weight_bytes * 2 == found.weight_bytes

    def test_too_little_memory_is_told_before_the_load(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint, "_free", lambda device: 1000)
        with pytest.raises(SpecError, match=r"its weights take .* GiB free"):
            find(str(saved), dtype=None, device="cpu")

    def test_another_architecture_is_refused(self, tmp_path: Path) -> None:
        config = LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=9,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(SpecError, match=r"an OLMo v1 checkpoint .*; this is 'llama'"):
            find(str(tmp_path), dtype=None, device="cpu")

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"length": 1}, "tokens=1: must be in 2..32"),
            ({"length": 33}, "tokens=33"),
            ({"text": "some words"}, "text=.*no tokenizer"),
        ],
    )
    def test_inputs_that_cannot_be_are_refused(
        self, saved: Path, options: dict[str, Any], told: str
    ) -> None:
        found: Checkpoint = find(str(saved), dtype=None, device="cpu")
        with pytest.raises(SpecError, match=told):
            tokens_of(found, **{"text": None, "length": 4, "seed": 0, **options})


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.main, words)


def test_the_command_judges_and_writes(saved: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = invoke("check", "--model", str(saved), "--tokens", "6", "--json", str(report))
    assert done.exit_code == 0, done.output
    assert "conforms; " in done.output
    body = json.loads(report.read_text())
    assert body["conforms"] is True
    assert body["complete"] == ["patched", "bridged"]
    with CATALOGUE["nudged.blocks.{i}.mlp.hook_out"].apply():
        red = invoke("check", "--model", str(saved), "--json", str(report))
    assert red.exit_code == 1
    assert "blocks.0.mlp.hook_out: value" in red.output
    body = json.loads(report.read_text())
    assert body["conforms"] is False
    assert body["gaps"]["bridged"][0]["site"] == "blocks.0.mlp.hook_out"


def test_the_command_survives_an_interrupt(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **options: Any) -> None:
        options["report"].judged["patched"], options["report"].gaps["patched"] = 7, []
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "judge_model", interrupted)
    report = tmp_path / "report.json"
    done = invoke("check", "--model", str(saved), "--json", str(report))
    assert done.exit_code == 130
    assert "interrupted; so far it conforms" in done.output
    assert json.loads(report.read_text())["interrupted"] is True


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "/no/such/folder"), "model='/no/such/folder'"),
        (("hooks", "--model", "x"), "without CHECKS"),
    ],
)
def test_the_command_refuses(words: tuple[str, ...], told: str) -> None:
    done = invoke("check", *words)
    assert done.exit_code == 2
    assert told in done.output
