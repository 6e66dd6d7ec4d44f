"""``bench``: what a compared case costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from conformance import profiles
from conformance.cli.base import get_ready, json_file_in_a_folder


@click.command()
@click.option("--adapter", metavar="MODULE:CLASS", default=profiles.DEFAULT_ADAPTER)
@click.option("--examples", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Write all numbers there.",
)
def bench(adapter: str, examples: int, repeats: int, seed: int, json_file: Path | None) -> None:
    """Measure the price of a compared case, in units of bare forwards and backwards.

    A case is one run through reference, bridged and patched model, forwards and backwards, with
    every site's value and gradient and every parameter's gradient compared. The floor is the same
    runs on models built before, with no hook and no comparison. Both are measured in turn.
    """
    get_ready()
    from conformance.bench import Spread
    from conformance.bench import bench as measure
    from conformance.run import load_adapter, versions

    judged = load_adapter(adapter)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("series", total=examples * repeats)
        found = measure(
            judged,
            examples=examples,
            repeats=repeats,
            seed=seed,
            each=lambda: progress.advance(task),
        )
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "min", "median", "max"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, value: Spread, form: str) -> None:
        table.add_row(name, *(format(x, form) for x in (value.low, value.median, value.high)))

    row("cases a second", found.cases_per_second, ".1f")
    row("floor, ms a case", found.floor, ".2f")
    row("ratio to the floor", found.ratio, ".2f")
    row("ratio of a case built afresh", found.fresh_ratio, ".2f")
    for stage, value in found.split.items():
        row(f"  {stage}, ms a case", value, ".2f")
    Console(highlight=False).print(table)
    click.echo(
        f"{repeats} times {found.cases} cases, {found.fresh_share:.1%} of them built afresh, "
        f"{found.shapes} distinct shapes, {found.facts} tensors compared each time; "
        f"peak memory {found.peak_memory:.0f} MiB"
    )
    if json_file is not None:
        report = {"adapter": adapter, "versions": versions(), **dataclasses.asdict(found)}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
