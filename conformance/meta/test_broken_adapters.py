"""An adapter class that cannot even be made is errored by every check, with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.olmo import modeling_olmo

from adapter import OlmoArchitectureAdapter
from conformance.checks import REGISTRY, Check, judge
from conformance.spec import Case, Edit, ModelSpec, RunSpec
from conformance.verdict import Outcome

CASE = Case(
    model=ModelSpec(num_hidden_layers=2, clip_qkv=0.5, biases=("q", "k", "v", "o")),
    run=RunSpec(seq_len=3, edits=(Edit(site="blocks.0.ln1.hook_normalized"),)),
)


class BrokenConstructorAdapter(OlmoArchitectureAdapter):
    def __init__(self, cfg: Any) -> None:
        raise ZeroDivisionError("a bad constructor")


class GreedyConstructorAdapter(OlmoArchitectureAdapter):
    def __init__(self, cfg: Any, more: Any) -> None:
        super().__init__(cfg)


class MaplessAdapter(OlmoArchitectureAdapter):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.component_mapping = None


class LostAdapter(OlmoArchitectureAdapter):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        assert self.component_mapping is not None
        self.component_mapping["ln_final"].name = "model.nowhere"


def reason_of(check: Check, broken: Any) -> str:
    verdict = judge(check, broken, CASE)
    assert verdict.outcome in (Outcome.ERRORED, Outcome.NOT_APPLICABLE), verdict.summary
    return verdict.reason if verdict.outcome is Outcome.ERRORED else ""


@pytest.mark.parametrize("check", REGISTRY.values(), ids=str)
def test_a_broken_constructor_is_errored_by_every_check(check: Check) -> None:
    said = reason_of(check, BrokenConstructorAdapter)
    # Where a directory is loaded by name, transformer_lens itself makes the adapter.
    by_name = check.name.startswith("loading.")
    where = "boot_transformers of .*" if by_name else "constructing the adapter"
    assert not said or re.fullmatch(f"{where}: ZeroDivisionError: a bad constructor", said)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (GreedyConstructorAdapter, "constructing the adapter: TypeError: .*'more'"),
        (MaplessAdapter, "building the bridge: ValueError: .*component_mapping"),
        (LostAdapter, "building the bridge: AttributeError: .*'nowhere'"),
    ],
)
def test_the_reason_says_what_is_broken(broken: Any, reason: str) -> None:
    assert re.match(reason, reason_of(REGISTRY["forward.logits"], broken))


def test_a_patched_library_is_noticed_though_the_reference_runs_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)))

    monkeypatch.setattr(modeling_olmo.OlmoMLP, "forward", forward)
    monkeypatch.setattr(modeling_olmo, "repeat_kv", lambda x, times: x.repeat(1, times, 1, 1))
    monkeypatch.setitem(ACT2FN, "relu", nn.SiLU)
    assert (
        judge(REGISTRY["hooks.values"], OlmoArchitectureAdapter, Case()).outcome is Outcome.PASSED
    )
    verdict = judge(REGISTRY["surface.untouched"], OlmoArchitectureAdapter, Case())
    module = modeling_olmo.__name__
    assert {gap.site for gap in verdict.gaps} == {
        "OlmoMLP.forward",
        f"{module}.repeat_kv",
        "ACT2FN[relu]",
    }
