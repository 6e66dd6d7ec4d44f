"""Every known defect has a short reproducer that stands alone."""

import ast
from pathlib import Path

import pytest

from conformance.data import FIXTURES

REPRODUCERS = sorted((FIXTURES / "reproducers").glob("*.py"))
LEDGER = (FIXTURES / "known_defects.toml").read_text(encoding="utf-8")


def test_the_ledger_and_the_folder_agree() -> None:
    assert REPRODUCERS
    for path in REPRODUCERS:
        assert f'reproducer = "reproducers/{path.name}"' in LEDGER
    assert LEDGER.count("[[defect]]") == len(REPRODUCERS)


@pytest.mark.parametrize("path", REPRODUCERS, ids=lambda path: path.stem)
def test_reproducer_is_short_and_stands_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 25
    imported = {
        str(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= {"torch", "transformers", "transformer_lens"}
