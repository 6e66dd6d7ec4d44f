"""Results outlive an interruption, and are never mixed with those of another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.fields import SpecError
from conformance.journal import Journal
from conformance.parallel import each_done

ABOUT = {"versions": {"torch": "2.13.0"}, "cap": 120.0}


def test_results_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path, ABOUT)
    first.add("a 0", {"killed": True, "cases": 3})
    first.add("b 0", {"killed": False, "cases": 60})
    assert Journal(path, ABOUT).results == first.results
    assert first.results["a 0"] == {"killed": True, "cases": 3}


def test_no_file_keeps_nothing_but_answers() -> None:
    journal = Journal(None, ABOUT)
    journal.add("a", {"x": 1})
    assert journal.results == {"a": {"x": 1}}


def test_a_line_that_was_cut_off_is_got_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, ABOUT)
    journal.add("a", {"x": 1})
    journal.add("b", {"x": 2})
    path.write_text(path.read_text()[:-9])
    again = Journal(path, ABOUT)
    assert again.results == {"a": {"x": 1}}
    again.add("b", {"x": 3})
    assert Journal(path, ABOUT).results == {"a": {"x": 1}, "b": {"x": 3}}


@pytest.mark.parametrize("cut", [5, 40])
def test_a_first_line_that_was_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, ABOUT)
    path.write_text(path.read_text()[:cut])
    with pytest.raises(SpecError, match="a journal of the same run"):
        Journal(path, ABOUT)


def test_results_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, ABOUT).add("a", {"x": 1})
    before = path.read_text()
    with pytest.raises(SpecError, match=r"journal=.*same run"):
        Journal(path, {**ABOUT, "cap": 60.0})
    assert path.read_text() == before


@pytest.mark.parametrize("line", ["no json", "[1]", '{"key": "a"}'])
def test_a_spoilt_line_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, ABOUT)
    journal.add("a", {"x": 1})
    head, entry = path.read_text().splitlines()
    path.write_text("\n".join([head, line, entry]) + "\n")
    with pytest.raises(SpecError, match="line 2"):
        Journal(path, ABOUT)


def square(number: int) -> int:
    if number < 0:
        raise ValueError(number)
    return number * number


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_done_once(jobs: int) -> None:
    assert sorted(each_done(square, range(5), jobs=jobs)) == [(n, n * n) for n in range(5)]


def test_an_error_of_the_work_is_raised() -> None:
    with pytest.raises(ValueError, match="-1"):
        list(each_done(square, [-1], jobs=1))
