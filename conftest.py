"""A checkout's pytest: the kit's plugin even where it is not installed, and work shared evenly."""

from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

installed = {point.value for point in entry_points(group="pytest11")}
pytest_plugins = [] if "conformance.plugin" in installed else ["conformance.plugin"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let an idle worker take over tests: ours last from a millisecond to half a minute."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


@pytest.fixture(scope="session", autouse=True)
def _draws_by_seed_alone() -> Iterator[None]:
    """The tests that draw on their own draw the same everywhere, as the suite does."""
    from conformance.draws import by_seed_alone

    with by_seed_alone():
        yield
