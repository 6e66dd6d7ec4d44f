"""A seed decides what is drawn, wherever the kit is installed and whatever else is imported."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from conformance.draws import drawing
from conformance.spec import Case, RunSpec

AS_IMPORTED = providers._get_local_constants  # before the session's fixture
CASES = st.integers(0, 2**20 - 1).map(lambda number: Case(run=RunSpec(token_seed=number)))
FEW = settings(max_examples=200, derandomize=True, database=None, deadline=None)


@pytest.fixture(autouse=True)
def _constants_as_imported() -> Iterator[None]:
    with patch.object(providers, "_get_local_constants", AS_IMPORTED):
        yield


def by_us(number: int) -> list[Case]:
    seen: list[Case] = []
    drawing(lambda case: seen.append(case), CASES, FEW, seed=number)()
    return seen


def by_hypothesis(number: int) -> list[Case]:
    seen: list[Case] = []
    seed(number)(
        settings(FEW, derandomize=False)(given(case=CASES)(lambda case: seen.append(case)))
    )()
    return seen


def test_what_is_imported_changes_no_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "olmo_constants.py").write_text(f"MANY = {[*range(1000, 30_000, 700)]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = by_us(3), by_hypothesis(3)
    importlib.import_module("olmo_constants")
    after = by_us(3), by_hypothesis(3)
    assert len(set(before[0])) > 100
    assert after[0] == before[0]
    assert after[1] != before[1], "Hypothesis does no such thing any more: drop by_seed_alone"


def test_a_seed_decides() -> None:
    assert by_us(3) == by_us(3) != by_us(4)


def test_a_failing_test_leaves_hypothesis_as_it_was() -> None:
    def fail(case: Case) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drawing(fail, CASES, FEW)()
    assert providers._get_local_constants is AS_IMPORTED
