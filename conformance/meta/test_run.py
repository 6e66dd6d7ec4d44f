"""The engine: who is judged under what, and that the same question gets the same answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
from hypothesis.strategies import just
from transformer_lens.model_bridge.supported_architectures.olmo import (
    OlmoArchitectureAdapter as UpstreamAdapter,
)

from adapter import OlmoArchitectureAdapter
from adapter.mlp import OlmoMLPBridge
from conformance import check_adapter, profiles, run, suite
from conformance.checks import REGISTRY, Check
from conformance.checks.registry import Adapter
from conformance.compare import Gap
from conformance.fields import SpecError
from conformance.profiles import PROFILES, Profile
from conformance.records import load
from conformance.run import (
    iter_verdicts,
    load_adapter,
    property_settings,
    run_check,
    select_checks,
    versions,
    write_case,
)
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import cases
from conformance.subjects import SubjectError
from conformance.verdict import ConformanceError, NotApplicable, Outcome, Verdict

CI = Profile("ci", 30, deterministic=True, stores=False)


class LoudMLP(OlmoMLPBridge):
    """Says one and a half times what it should, behind its own hooks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 1.5 * super().forward(*args, **kwargs)


class Broken(OlmoArchitectureAdapter):
    """An adapter whose every bridged model is wrong from the first MLP on."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        assert self.component_mapping is not None
        self.component_mapping["blocks"].submodules["mlp"].__class__ = LoudMLP


class Crashing(OlmoArchitectureAdapter):
    """An adapter that never gets as far as a model."""

    def __init__(self, cfg: Any) -> None:
        raise ValueError("boom")


class Question:
    """A check that builds no model: quick enough to ask often."""

    def __init__(self, *, weighs: float = 1.0) -> None:
        self.asked: list[Case] = []
        self.check = Check(
            "some.question",
            "Something.",
            self.judge,
            cases,
            weighs,
            type("E", (ConformanceError,), {}),
        )

    def judge(self, adapter: Adapter, case: Case) -> Iterator[Gap]:
        self.asked.append(case)
        yield from self.answer(case)

    def answer(self, case: Case) -> Iterator[Gap]:
        """No gap."""
        yield from ()


class Failing(Question):
    def answer(self, case: Case) -> Iterator[Gap]:
        if case.model.num_attention_heads > 2 and case.run.seq_len > 3:
            yield Gap("site", "value", f"of {case.model.num_attention_heads} heads")


def ask(question: Question, seed: int | None = None, on: Profile = CI) -> Verdict:
    return run_check(question.check, OlmoArchitectureAdapter, on=on, seed=seed)


def timeless(verdict: Verdict) -> Verdict:
    return dataclasses.replace(verdict, seconds=0.0)


# --- who is judged


def test_adapters_are_found_by_name() -> None:
    assert load_adapter("adapter:OlmoArchitectureAdapter") is OlmoArchitectureAdapter
    assert load_adapter("upstream") is UpstreamAdapter
    assert load_adapter(f"{__name__}:Broken") is Broken


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere:Adapter", "cannot import: No module named 'nowhere'"),
        ("adapter.nowhere:Adapter", "cannot import: No module named 'adapter.nowhere'"),
        ("adapter:Nothing", "adapter has no Nothing"),
        ("adapter:bridge", "a subclass of transformer_lens' ArchitectureAdapter"),
        ("adapter.mlp:OlmoMLPBridge", "a subclass of transformer_lens' ArchitectureAdapter"),
        ("adapter", "must be MODULE:CLASS, or upstream for the installed transformer_lens' own"),
        ("adapter:", "must be MODULE:CLASS, or upstream for the installed transformer_lens' own"),
        (":Adapter", "must be MODULE:CLASS, or upstream for the installed transformer_lens' own"),
        ("", "must be MODULE:CLASS, or upstream for the installed transformer_lens' own"),
    ],
)
def test_a_bad_adapter_is_one_clear_line(name: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_adapter(name)
    line = str(caught.value)
    assert line.startswith(f"adapter={name!r}: must be ")
    assert line.endswith(told)
    assert "\n" not in line


def test_the_environment_selects_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(profiles.ADAPTER_VARIABLE, raising=False)
    assert run.selected_adapter() is OlmoArchitectureAdapter
    monkeypatch.setenv(profiles.ADAPTER_VARIABLE, "upstream")
    assert run.selected_adapter() is UpstreamAdapter


# --- under what


def test_checks_are_selected_by_name_and_by_surface() -> None:
    assert select_checks([]) == list(REGISTRY.values())
    hooks = [check for name, check in REGISTRY.items() if name.startswith("hooks.")]
    assert select_checks(["hooks"]) == hooks
    assert select_checks(["forward.loss", "hooks", "hooks.names"]) == [
        REGISTRY["forward.loss"],
        *hooks,
    ]


@pytest.mark.parametrize("name", ["hook", "hooks.", "forward.nothing", "", "Forward"])
def test_an_unknown_check_is_one_clear_line(name: str) -> None:
    with pytest.raises(SpecError, match=r"^check='.*': must be one of \['alive\.advertised'"):
        select_checks(["forward", name])


def test_a_check_draws_its_share_of_the_profile_s_examples() -> None:
    assert property_settings(Question(weighs=0.5).check, CI).max_examples == 15
    assert property_settings(Question(weighs=2.0).check, CI).max_examples == 60
    assert property_settings(Question(weighs=0.001).check, CI).max_examples == 1


@pytest.mark.parametrize("profile", [*PROFILES.values(), Profile("none", 1, False, False)], ids=str)
def test_a_profile_draws_the_same_or_keeps_a_database(profile: Profile) -> None:
    on = property_settings(Question().check, profile)
    assert on.derandomize is profile.deterministic
    assert (on.database is not None) is profile.stores
    assert on.deadline is None


# --- the verdicts


def test_a_check_that_finds_nothing_passes() -> None:
    question = Question()
    calls: list[None] = []
    verdict = run_check(
        question.check, OlmoArchitectureAdapter, on=CI, each=lambda: calls.append(None)
    )
    assert verdict.outcome is Outcome.PASSED
    assert verdict.check == "some.question"
    assert verdict.adapter == "adapter.olmo:OlmoArchitectureAdapter"
    assert verdict.examples == len(question.asked) == len(calls) == 30
    assert verdict.seconds > 0


def test_the_first_failing_case_is_shrunk_and_all_cases_are_counted() -> None:
    question = Failing()
    verdict = ask(question)
    assert verdict.outcome is Outcome.FAILED
    assert verdict.summary == "site: value: of 3 heads"
    assert verdict.case is not None
    assert (verdict.case.model.num_attention_heads, verdict.case.run.seq_len) == (3, 4)
    assert verdict.case.model.num_hidden_layers == 1
    assert verdict.examples == len(question.asked)


class Once(Question):
    """Fails once, as a race between threads may."""

    def answer(self, case: Case) -> Iterator[Gap]:
        if len(self.asked) == 7:
            yield Gap("site", "value", "of this run only")


def test_what_fails_only_once_is_held_against_the_adapter() -> None:
    question = Once()
    verdict = ask(question)
    assert verdict.outcome is Outcome.FAILED
    assert verdict.case == question.asked[6]
    assert [gap.site for gap in verdict.gaps] == ["site", "the same case again"]
    assert "not in the next" in verdict.gaps[1].detail


def test_ci_gives_the_same_verdict_on_the_same_cases_every_time() -> None:
    first, second = Failing(), Failing()
    assert timeless(ask(first)) == timeless(ask(second))
    assert first.asked == second.asked


def test_a_seed_changes_the_draws_and_is_as_deterministic() -> None:
    drawn = []
    for seed in (None, 1, 1, 2):
        question = Question()
        ask(question, seed)
        drawn.append(question.asked)
    plain, one, again, two = drawn
    assert one == again
    assert plain != one
    assert one != two


def test_a_check_applies_if_it_does_to_one_case() -> None:
    class Never(Question):
        def answer(self, case: Case) -> Iterator[Gap]:
            raise NotApplicable("nothing to judge")

    class Sometimes(Question):
        def answer(self, case: Case) -> Iterator[Gap]:
            if case.run.batch > 1:
                raise NotApplicable("nothing to judge")
            yield from ()

    verdict = ask(Never())
    assert (verdict.outcome, verdict.reason) == (Outcome.NOT_APPLICABLE, "nothing to judge")
    assert ask(Sometimes()).outcome is Outcome.PASSED


def test_a_subject_that_breaks_is_errored_and_a_kit_that_breaks_is_not_judged() -> None:
    class SubjectBreaks(Question):
        def answer(self, case: Case) -> Iterator[Gap]:
            raise SubjectError("running: boom")
            yield

    class KitBreaks(Question):
        def answer(self, case: Case) -> Iterator[Gap]:
            raise ZeroDivisionError("ours")
            yield

    verdict = ask(SubjectBreaks())
    assert (verdict.outcome, verdict.reason) == (Outcome.ERRORED, "running: boom")
    with pytest.raises(ZeroDivisionError, match="ours"):
        ask(KitBreaks())


# --- of real adapters


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ci profile of a few cases."""
    monkeypatch.setitem(PROFILES, "ci", dataclasses.replace(CI, examples=5))


@pytest.mark.usefixtures("few")
def test_check_adapter_returns_a_verdict_a_check_in_order() -> None:
    for judged in (OlmoArchitectureAdapter, "adapter:OlmoArchitectureAdapter"):
        verdicts = check_adapter(judged, checks=["forward.logits", "hooks.names"])
        assert [verdict.check for verdict in verdicts] == ["forward.logits", "hooks.names"]
        assert [verdict.outcome for verdict in verdicts] == [Outcome.PASSED] * 2
        assert [verdict.examples for verdict in verdicts] == [5, 2]


def test_check_adapter_refuses_what_does_not_exist() -> None:
    with pytest.raises(
        SpecError, match=r"^profile='quick': must be one of \['ci', 'deep', 'dev'\]"
    ):
        check_adapter(profile_name="quick")
    with pytest.raises(SpecError, match=r"^adapter='nowhere:X'"):
        check_adapter("nowhere:X")
    with pytest.raises(SpecError, match=r"^check='nothing'"):
        check_adapter(checks=["nothing"])


CASE = Case(model=ModelSpec(num_hidden_layers=2), run=RunSpec(seq_len=3))


def only(name: str) -> Check:
    """A check of the registry that draws but one case."""
    return dataclasses.replace(REGISTRY[name], cases=lambda: just(CASE))


def test_a_broken_adapter_fails_at_its_first_wrong_site() -> None:
    verdict = run_check(only("hooks.values"), Broken, on=CI)
    assert verdict.outcome is Outcome.FAILED
    assert verdict.adapter == f"{__name__}:Broken"
    assert verdict.gaps[0].site == "blocks.0.hook_out"
    assert verdict.gaps[-1].site == "logits"
    assert verdict.case == CASE


def test_a_crashing_adapter_is_errored() -> None:
    verdict = run_check(only("forward.logits"), Crashing, on=CI)
    assert verdict.outcome is Outcome.ERRORED
    assert verdict.reason == "constructing the adapter: ValueError: boom"


def test_what_starts_is_told_before_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question(weighs=0.5), Failing()]
    monkeypatch.setattr(run, "select_checks", lambda names: [each.check for each in questions])
    told: list[object] = []
    for verdict in iter_verdicts(
        OlmoArchitectureAdapter,
        checks=(),
        on=CI,
        seed=None,
        starting=lambda check, examples: told.append(examples),
    ):
        told.append(verdict.outcome)
    assert told == [15, Outcome.PASSED, 30, Outcome.FAILED]


# --- on file


def test_a_written_case_is_where_the_replay_line_says_and_can_be_read(tmp_path: Path) -> None:
    verdict = Verdict("hooks.values", "a:B", Outcome.FAILED, CASE, (Gap("site", "value", "off"),))
    path = write_case(verdict, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "hooks.values.json"
    assert load(path) == verdict.record(versions())
    assert write_case(verdict, path.parent) == path


def test_versions_are_told_installed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["olmo-conformance", "transformer-lens", "transformers", "torch", "hypothesis"]
    assert list(versions()) == names

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(run, "version", missing)
    assert versions() == dict.fromkeys(names, "not installed")


def test_every_check_has_a_test_in_the_suite() -> None:
    names = [each.name for each in iter_modules(suite.__path__) if each.name.startswith("test_")]
    modules = [import_module(f"{suite.__name__}.{name}") for name in names]
    found = {getattr(it, "__name__", "") for module in modules for it in vars(module).values()}
    assert {f"test_{name.replace('.', '_')}" for name in REGISTRY} <= found
