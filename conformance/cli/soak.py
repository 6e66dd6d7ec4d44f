"""``soak``: draw very many fresh cases and count the disagreements."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from conformance import profiles
from conformance.cli.base import CONFORMS, DOES_NOT_CONFORM, get_ready, json_file_in_a_folder

CHUNK = 100  # cases between two entries of the journal


def judge_chunk(task: tuple[str, str, int, str]) -> dict[str, Any]:
    """One chunk of one check's cases, in a process of its own."""
    from conformance.checks import REGISTRY
    from conformance.run import load_adapter, run_check, write_case

    name, adapter, seed, failures = task
    check = REGISTRY[name]
    on = dataclasses.replace(profiles.PROFILES["deep"], examples=round(CHUNK / check.examples))
    verdict = run_check(check, load_adapter(adapter), on=on, seed=seed)
    if verdict.bad:
        write_case(verdict, Path(failures) / f"seed-{seed}")
    told = verdict.summary if verdict.bad else ""
    return {"cases": verdict.examples, "outcome": verdict.outcome.value, "gap": told}


@click.command()
@click.argument("checks", nargs=-1, metavar="[CHECKS]...")
@click.option(
    "--cases",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help=f"Of each check, rounded up to whole chunks of {CHUNK}.",
)
@click.option("--adapter", metavar="MODULE:CLASS", default=profiles.DEFAULT_ADAPTER)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Keep each chunk's result there at once; those it has are not got again.",
)
@click.option(
    "--failures",
    type=click.Path(file_okay=False, path_type=Path),
    default=profiles.FAILURES,
    show_default=True,
    help="Where a disagreement leaves its case.",
)
@click.pass_context
def soak(
    ctx: click.Context,
    checks: tuple[str, ...],
    cases: int,
    adapter: str,
    seed: int,
    jobs: int,
    journal: Path | None,
    failures: Path,
) -> None:
    """Draw fresh cases for CHECKS (names or surfaces, else all) and count the disagreements.

    A chunk ends with its first disagreement, which is shrunk and recorded; the next goes on.
    """
    get_ready()
    from conformance.journal import Journal
    from conformance.parallel import each_done
    from conformance.run import load_adapter, select_checks, versions

    load_adapter(adapter)
    chosen = [check.name for check in select_checks(checks)]
    known = Journal(journal, {"versions": versions(), "adapter": adapter, "chunk": CHUNK})
    chunks = range(seed, seed - (-cases // CHUNK))
    # Chunk by chunk through all checks: an interrupted run has seen something of each.
    tasks = {
        (name, adapter, number, str(failures)): f"{name} {number}"
        for number in chunks
        for name in chosen
    }
    missing = [task for task, key in tasks.items() if key not in known.results]
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("chunks", total=len(tasks), completed=len(tasks) - len(missing))
        for task, result in each_done(judge_chunk, missing, jobs=jobs):
            known.add(tasks[task], result)
            progress.advance(bar)
            if result["gap"]:
                click.echo(f"{tasks[task]}: {result['outcome']}: {result['gap']}", err=True)
    drawn: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for (name, *_), key in tasks.items():
        result = known.results[key]
        drawn[name] += result["cases"]
        bad[name] += result["outcome"] in ("failed", "errored")
    for name in chosen:
        click.echo(f"{name}: {drawn[name]} cases, {bad[name]} disagreements")
    total = sum(bad.values())
    click.echo(f"{total} disagreements in {sum(drawn.values())} cases of {len(chosen)} checks")
    ctx.exit(DOES_NOT_CONFORM if total else CONFORMS)
