"""``mutants``: break the project's own bridge on purpose, and see which check notices."""

from __future__ import annotations

import datetime
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from conformance.cli.base import CONFORMS, DOES_NOT_CONFORM, get_ready, json_file_in_a_folder
from conformance.fields import SpecError

Result = dict[str, Any]


def judge_mutant(task: tuple[str, int, float]) -> Result:
    """What becomes of a mutant under one seed, in a process of its own."""
    from conformance.mutants import CATALOGUE, kill

    name, seed, cap = task
    found = kill(CATALOGUE[name], seed=seed, cap=cap)
    summary = found.verdict.summary if found.verdict is not None else ""
    return {
        "killed": found.killed,
        "cases": found.cases,
        "seconds": round(found.seconds, 2),
        "gap": summary,
    }


@click.command()
@click.argument("names", nargs=-1, metavar="[NAMES]...")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--cap", type=click.FloatRange(min=1), default=120.0, show_default=True)
@click.option("--rotating", type=click.IntRange(min=1), help="Only so many, others every day.")
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Keep each result there at once; those it has are not got again.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Write all results there.",
)
@click.pass_context
def mutants(
    ctx: click.Context,
    names: tuple[str, ...],
    seeds: int,
    jobs: int,
    cap: float,
    rotating: int | None,
    journal: Path | None,
    json_file: Path | None,
) -> None:
    """Judge NAMES, deliberately broken bridges (or surfaces: hooks is all of hooks.*); else all.

    Each is applied to the project's own adapter, and the check that is named for it draws as many
    cases as in the ci profile, under every seed, or until CAP seconds are over. It is killed if the
    check finds a difference in a case in which the adapter without it has none. Exit code 1 if one
    survives more than one seed in ten, or more than one of fewer.
    """
    get_ready()
    from conformance.journal import Journal
    from conformance.mutants import CATALOGUE
    from conformance.parallel import each_done
    from conformance.run import versions

    picked = [name for name in CATALOGUE if not names or {name, name.split(".")[0]} & set(names)]
    surfaces = {name.split(".")[0] for name in CATALOGUE}
    if unknown := [name for name in names if name not in CATALOGUE and name not in surfaces]:
        raise SpecError("mutant", unknown[0], f"a surface, {sorted(surfaces)}, or a name in one")
    if rotating is not None and rotating > len(picked):
        raise SpecError("rotating", rotating, f"at most {len(picked)}, the mutants named")
    if rotating is not None:
        # Far apart in the catalogue, where neighbours are alike.
        today, total = datetime.date.today().toordinal(), len(picked)
        picked = [picked[(today + k * total // rotating) % total] for k in range(rotating)]
    known = Journal(journal, {"versions": versions(), "cap": cap})
    tasks = {(name, seed, cap): f"{name} {seed}" for name in picked for seed in range(seeds)}
    missing = [task for task, key in tasks.items() if key not in known.results]
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("mutants", total=len(tasks), completed=len(tasks) - len(missing))
        for done, (task, result) in enumerate(each_done(judge_mutant, missing, jobs=jobs), start=1):
            known.add(tasks[task], result)
            progress.advance(bar)
            if not console.is_terminal:
                fate = "killed" if result["killed"] else "SURVIVED"
                told = (
                    f"[{done}/{len(missing)}] {tasks[task]}: {fate} after {result['cases']} cases"
                )
                click.echo(told, err=True)
    results: dict[str, list[Result]] = defaultdict(list)
    for (name, _, _), key in tasks.items():
        results[name].append(known.results[key])
    spared = max(seeds // 10, 1) if seeds > 1 else 0
    weak = {name for name, found in results.items() if _survived(found) > spared}
    _print_table(results, {name: CATALOGUE[name].killer for name in picked})
    every = [result for found in results.values() for result in found]
    killed = [result["cases"] for result in every if result["killed"]]
    click.echo(
        f"{len(picked) - len(weak)} of {len(picked)} mutants killed, at least in all seeds but "
        f"{spared} of {seeds}; "
        f"{len(killed)} of {len(every)} runs killed theirs, "
        f"after {statistics.median(killed) if killed else 0:g} drawn cases in the median"
    )
    if json_file is not None:
        report = {"versions": versions(), "seeds": seeds, "cap": cap, "mutants": results}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    ctx.exit(DOES_NOT_CONFORM if weak else CONFORMS)


def _survived(found: list[Result]) -> int:
    return sum(not result["killed"] for result in found)


def _print_table(results: dict[str, list[Result]], killers: dict[str, str]) -> None:
    """A row a mutant: how often it died, of which check, after how many cases and seconds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("mutant, and the check that must kill it", overflow="fold")
    for name in ("killed", "cases", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, found in results.items():
        killed = len(found) - _survived(found)
        cases = statistics.median(result["cases"] for result in found)
        seconds = statistics.median(result["seconds"] for result in found)
        row = (f"{name}  {killers[name]}", f"{killed}/{len(found)}", f"{cases:g}", f"{seconds:.1f}")
        table.add_row(*row, style="" if killed == len(found) else "red")
    Console(highlight=False).print(table)
