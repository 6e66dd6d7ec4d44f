"""What is being judged, while it is: a bar on a terminal, a line a check elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from conformance.checks import Check
    from conformance.verdict import Verdict


class Progress:
    """What is being judged: a bar on a terminal, a line a check elsewhere. Both on stderr."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._total, self._done = total, 0
        self._checks = self._bar.add_task("checks", total=total)
        self._cases = self._bar.add_task("cases", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def starting(self, check: Check, examples: int) -> None:
        """A check with so many cases begins."""
        self._bar.reset(self._cases, total=examples, description=check.name)

    def advance(self) -> None:
        """One more case is judged. While a failing one is shrunk there are more than announced."""
        self._bar.advance(self._cases)

    def done(self, verdict: Verdict) -> None:
        """A check has its verdict."""
        self._done += 1
        self._bar.advance(self._checks)
        if self._bar.disable:
            line = f"[{self._done}/{self._total}] {verdict.check}: {verdict.outcome.value}"
            click.echo(f"{line}, {verdict.examples} cases, {verdict.seconds:.1f} s", err=True)
