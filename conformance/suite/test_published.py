from collections.abc import Iterator

import pytest
from filelock import FileLock

from conformance.checks import gradients, require
from conformance.data import published
from conformance.spec import Case, RunSpec
from conformance.suite.properties import judged

SPECS = published()


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A 7B shape costs some 6 GB: never two at once, on however many workers."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "published.lock"):
        yield


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", sorted(SPECS))
def test_published_configuration(name: str) -> None:
    run = RunSpec(batch=1, seq_len=5, token_seed=1)
    require(gradients.everywhere, judged(), Case(model=SPECS[name], run=run))


def test_the_published_clip_is_among_them() -> None:
    assert SPECS["OLMo-7B-0424-hf"].clip_qkv == 8.0
    assert {spec.hidden_size for spec in SPECS.values()} == {2048, 4096}
