"""Failing examples are kept where they were told to be, and found again by another process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis.database import DirectoryBasedExampleDatabase

from conformance.checks import REGISTRY
from conformance.database import example_database
from conformance.fields import SpecError
from conformance.profiles import DATABASE_VARIABLE, profile
from conformance.run import property_settings

ROOT = Path(__file__).parents[2]

PROPERTY = """
from hypothesis import given, settings, strategies as st
from conformance.database import chosen_database
tried = []

@settings(database=chosen_database(), deadline=None)
@given(st.integers(0, 10**9))
def test(number):
    tried.append(number)
    assert number < 10**6

try:
    test()
except AssertionError:
    pass
print(tried[0])
"""


def first_tried(place: str, folder: Path) -> int:
    """The first example that a new process tries of a property that fails from a million on."""
    environment = {
        **os.environ,
        DATABASE_VARIABLE: place,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", PROPERTY]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """A redis-server of its own: the address of it."""
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server here: Debian's package redis-server has it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        server,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    address = f"redis://127.0.0.1:{port}/0"
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_a_redis_keeps_a_failure_for_other_processes(redis: str, tmp_path: Path) -> None:
    assert first_tried(redis, tmp_path) < 10**6  # nothing is known yet
    assert first_tried(redis, tmp_path) == 10**6  # the shrunk failure, first of all
    assert not (tmp_path / ".hypothesis" / "examples").exists()


def test_profiles_that_keep_failures_ask_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = next(iter(REGISTRY.values()))
    monkeypatch.setenv(DATABASE_VARIABLE, str(tmp_path / "kept"))
    for name, stores in (("ci", False), ("dev", True), ("deep", True)):
        found = property_settings(check, profile(name)).database
        assert found == (example_database(str(tmp_path / "kept")) if stores else None)


def test_a_folder_does_too(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert isinstance(example_database(str(kept)), DirectoryBasedExampleDatabase)
    database = example_database(str(kept))
    database.save(b"key", b"value")
    assert list(DirectoryBasedExampleDatabase(kept).fetch(b"key")) == [b"value"]


def test_no_redis_is_a_clear_error() -> None:
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    with pytest.raises(SpecError, match=r"example-database='redis://127.0.0.1:9/0'.*answers"):
        example_database("redis://127.0.0.1:9/0")
    with pytest.raises(SpecError, match=r"example-database='ftp://x'"):
        example_database("ftp://x")


def test_no_client_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "hypothesis.extra.redis", raising=False)
    with pytest.raises(SpecError, match=r"olmo-conformance.redis"):
        example_database("redis://127.0.0.1:6379/15")
