"""Judge a release: get it, run a process on it, and go on where an earlier run was interrupted.

A release is unpacked beside the installed one, without what it depends on, and put before it on
PYTHONPATH. What a process has judged is on file line by line (see `conformance.history.worker`), so
that neither an interrupt nor a crash loses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import conformance
from conformance.history.table import KIT_FAILED, Cell, Column
from conformance.ledger import LEDGER

RELEASES = (
    "3.0.0",
    "3.3.0",
    "3.5.1",
    "3.6.0",
    "3.7.3",
    "3.9.0",
    "4.0.0",
    "4.1.0",
    "4.2.0",
    "4.3.0",
)
# What releases before 4 need beside what today's does.
EXTRA = "better-abc==0.0.3"
MOST_SECONDS = 600  # of one check
_PACKAGE = Path(conformance.__file__).parent
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Unavailable(Exception):  # noqa: N818 - no fault of this program
    """A release that cannot be had, and why."""


@dataclass
class State:
    """What is on file of one release.

    Attributes:
        versions: Of all that takes part, once a process was ready to judge.
        started: The check that a process judged last.
        cells: What checks have come to.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    started: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)


def overlay(release: str, cache: Path) -> Path:
    """The folder of an unpacked release, which is got with pip unless it is there.

    Raises:
        Unavailable: If pip does not get it.
    """
    folder = cache / f"transformer-lens-{release}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    wanted = [f"transformer-lens=={release}", EXTRA]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--target", str(partial), *wanted], capture_output=True, text=True
    )
    if done.returncode:
        raise Unavailable(_last_line(done.stderr) or f"pip ended with {done.returncode}")
    partial.rename(folder)
    return folder


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def fingerprint(examples: int) -> str:
    """A short name of everything that a verdict depends on, but for the release."""
    seen = hashlib.sha256(str(examples).encode())
    for name in ("torch", "transformers", "hypothesis"):
        seen.update(version(name).encode())
    for pattern in ("*.py", "checks/*.py", "history/*.py"):
        for path in sorted(_PACKAGE.glob(pattern)):
            seen.update(path.read_bytes())
    seen.update(LEDGER.read_bytes())
    return seen.hexdigest()[:12]


def read(file: Path) -> State:
    """What a file of events says; a last line that is not complete says nothing."""
    state = State()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        state.versions = event.get("ready", state.versions)
        state.started = event.get("starting", state.started)
        if "check" in event:
            state.cells[event["check"]] = event["cell"]
    return state


def _run(
    folder: Path,
    file: Path,
    arguments: Sequence[str],
    told: Callable[[], None],
    stop: Event,
) -> str:
    """Run a worker on a release; why it ended early, if it did."""
    paths = [str(folder), str(_PACKAGE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    given = {**os.environ, **_QUIET, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-m", "conformance.history.worker", str(file), *arguments]
    errors = file.with_suffix(".stderr")
    with (
        errors.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL, stderr=stderr) as process,
    ):
        try:
            if why := _waited(process, file, told, stop):
                return why
        finally:
            process.kill()
    last = _last_line(errors.read_text(encoding="utf-8"))
    return (last or f"the process ended with {process.returncode}") if process.returncode else ""


def _waited(
    process: subprocess.Popen[bytes], file: Path, told: Callable[[], None], stop: Event
) -> str:
    """Wait for a process to end; why there is no more waiting for it."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        told()
        if stop.wait(0.3):
            return "interrupted"
        now = file.stat().st_size if file.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > MOST_SECONDS:
            return f"no verdict in {MOST_SECONDS} s"
    return ""


def judge(
    release: str,
    cache: Path,
    checks: Sequence[str],
    *,
    examples: int,
    each: Callable[[int], None] = lambda done: None,
    stop: Event | None = None,
) -> Column:
    """Judge upstream's adapter in a release under some checks, but for what is on file already.

    A check that takes the process down, or does not end, is a cell of its own; the others go on.

    Args:
        release: Of transformer_lens.
        cache: Where releases and what was judged are kept.
        checks: Their names.
        examples: Cases of a check of weight 1.
        each: Told again and again how many checks have their verdict.
        stop: Set where the run is to end.
    """
    stop = stop or Event()
    cache.mkdir(parents=True, exist_ok=True)
    try:
        folder = overlay(release, cache)
    except Unavailable as none:
        return Column({"transformer-lens": release}, broken=str(none))
    file = cache / f"{release}-{fingerprint(examples)}.jsonl"
    while True:
        state = read(file)
        left = [name for name in checks if name not in state.cells]
        if not left:
            return Column(state.versions, checks={name: state.cells[name] for name in checks})
        arguments = [str(examples), *left]
        why = _run(folder, file, arguments, lambda: each(len(read(file).cells)), stop)
        after = read(file)
        if stop.is_set():
            raise KeyboardInterrupt
        if not after.versions:
            return Column({"transformer-lens": release}, broken=why)
        if why or len(after.cells) == len(state.cells):
            cell = {"outcome": KIT_FAILED, "examples": 0, "told": why, "known": {}}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"check": after.started, "cell": cell}) + "\n")
