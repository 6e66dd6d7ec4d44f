import pytest

from conformance.checks import REGISTRY
from conformance.data import FIXTURES

README = FIXTURES.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="a wheel carries no README")
def test_readme_lists_every_promise() -> None:
    rows = [f"| `{check.name}` | {check.promise} |" for check in REGISTRY.values()]
    table = "\n".join(["| check | promise |", "|---|---|", *rows])
    between = f"{table}\n<!-- /promises -->"
    assert between in README.read_text(encoding="utf-8"), f"README's promises should be:\n\n{table}"
