"""``history``: judge upstream's own adapter in every release and write one table of it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import click
import rich.progress
from rich.console import Console

from conformance.cli.base import (
    CONFORMS,
    DOES_NOT_CONFORM,
    KIT_FAILED,
    BadInput,
    get_ready,
    json_file_in_a_folder,
)
from conformance.history import table
from conformance.history.releases import RELEASES, judge
from conformance.profiles import PROFILES

if TYPE_CHECKING:
    from conformance.history.table import Column, History


@click.command()
@click.argument("checks", nargs=-1, metavar="[CHECKS]...")
@click.option(
    "--releases",
    metavar="X.Y.Z,X.Y.Z",
    default=",".join(RELEASES),
    show_default=True,
    help="Releases of transformer_lens.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=PROFILES["ci"].examples,
    show_default=True,
    help="Cases of a check of weight 1.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=min(2, os.cpu_count() or 1),
    show_default=True,
    help="Releases judged at a time.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=".history",
    show_default=True,
    help="Where releases are unpacked, and what is judged is kept.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Write the table there, with the case behind every red cell.",
)
@click.option(
    "--markdown",
    "page",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Write the table between the marks of this page, instead of printing it.",
)
@click.pass_context
def history(
    ctx: click.Context,
    checks: tuple[str, ...],
    releases: str,
    examples: int,
    jobs: int,
    cache: Path,
    json_file: Path | None,
    page: Path | None,
) -> None:
    """Judge upstream's own adapter in every release under CHECKS: names or surfaces; else all.

    Each release has a process of its own. What an interrupted run has judged is not judged again.
    Exit code 0 says that nothing but known defects was seen.
    """
    wanted = [name.strip() for name in releases.split(",") if name.strip()]
    if not wanted:
        raise BadInput(f"releases={releases!r}: must be a comma-separated list of releases")
    get_ready()
    from conformance.run import select_checks

    names = [check.name for check in select_checks(checks)]
    made = table.History(examples, _all(wanted, cache, names, examples, jobs), table.known_now())
    if json_file is not None:
        json_file.write_text(table.dumps(made), encoding="utf-8")
    if page is not None:
        before = page.read_text(encoding="utf-8") if page.exists() else ""
        page.write_text(table.spliced(before, table.markdown(made)), encoding="utf-8")
    else:
        click.echo(table.markdown(made))
    ctx.exit(_code(made))


def _all(
    releases: list[str], cache: Path, names: list[str], examples: int, jobs: int
) -> dict[str, Column]:
    """Judge some releases at a time, and say how far each is."""
    console, stop = Console(stderr=True, highlight=False), Event()
    bar = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns()[:2],
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks = {release: bar.add_task(release, total=len(names), start=False) for release in releases}

    def one(release: str) -> Column:
        bar.start_task(tasks[release])
        try:
            column = judge(
                release,
                cache,
                names,
                examples=examples,
                each=lambda done: bar.update(tasks[release], completed=done),
                stop=stop,
            )
        except Exception as error:  # one broken release does not lose the others
            column = table.Column({"transformer-lens": release}, broken=repr(error))
        click.echo(f"{release}: {column.broken or f'{len(column.checks)} checks'}", err=True)
        return column

    with bar, ThreadPoolExecutor(jobs) as pool:
        try:
            return dict(zip(releases, pool.map(one, releases), strict=True))
        finally:
            stop.set()  # an interrupt ends the processes of the other releases, too
            pool.shutdown(cancel_futures=True)


def _code(made: History) -> int:
    """The exit code, with a line for all that is news."""
    news = list(made.news())
    for release, name, cell in news:
        click.echo(f"news: {release}/{name}: {cell['told']}", err=True)
    failed = [
        f"{release}/{name}: {cell['told']}"
        for release, column in made.releases.items()
        for name, cell in column.checks.items()
        if cell["outcome"] == table.KIT_FAILED
    ]
    failed += [
        f"{name}: {column.broken}" for name, column in made.releases.items() if column.broken
    ]
    for told in failed:
        click.echo(f"not judged: {told}", err=True)
    if failed:
        return KIT_FAILED
    return DOES_NOT_CONFORM if news else CONFORMS
