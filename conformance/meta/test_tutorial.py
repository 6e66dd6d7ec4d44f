"""The tutorial's code runs, and prints what stands under it."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.checks.support import registry
from conformance.cli import main
from conformance.data import FIXTURES

DOCS = FIXTURES.parent / "docs"
PAGE = DOCS / "tutorial.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="a wheel carries no docs")


def require_same(wanted: str, got: str, line: int) -> None:
    same = OutputChecker().check_output(wanted, got, ELLIPSIS | NORMALIZE_WHITESPACE)
    assert same, f"{PAGE.name}, line {line}: printed\n{got}instead of\n{wanted}"


def test_every_block_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = "transformer_lens.tools.analysis.attribution_patching"
    pytest.importorskip(newest, reason="the page is for transformer_lens 4.3")
    from sybil import Example, Sybil  # of the extra `test`: a wheel's suite goes without
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

    printed: list[str] = []

    def text(example: Example) -> None:
        require_same(example.parsed, printed.pop(), example.line)

    def console(example: Example) -> None:
        command, _, wanted = example.parsed.partition("\n")
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "olmo-conformance"
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        require_same(wanted, result.stdout, example.line)

    parsers: list[Any] = [
        PythonCodeBlockParser(),
        CodeBlockParser("text", text),
        CodeBlockParser("console", console),
    ]
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    monkeypatch.chdir(tmp_path)
    page = Sybil(parsers, path=str(DOCS)).parse(PAGE)
    blocks = list(page.examples())
    assert len(blocks) == len(re.findall(r"^```\w", PAGE.read_text(encoding="utf-8"), re.M))
    with registry():
        for block in blocks:
            with redirect_stdout(io.StringIO()) as out:
                block.evaluate()
            if out.getvalue():
                assert not printed, f"{PAGE.name}: nothing shows what was printed: {printed}"
                printed.append(out.getvalue())
    assert not printed
    made = (tmp_path / "heads.svg").read_text(encoding="utf-8")
    assert made == (DOCS / "heads.svg").read_text(encoding="utf-8")
