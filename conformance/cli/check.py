"""``check``: judge an adapter and print the verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conformance import profiles
from conformance.cli import real
from conformance.cli.base import closing, exit_code, get_ready, json_file_in_a_folder
from conformance.cli.progress import Progress
from conformance.fields import SpecError
from conformance.spec import DTYPES

if TYPE_CHECKING:
    from conformance.verdict import Verdict


@click.command()
@click.argument("checks", nargs=-1, metavar="[CHECKS]...")
@click.option(
    "--adapter",
    metavar="MODULE:CLASS",
    default=profiles.DEFAULT_ADAPTER,
    envvar=profiles.ADAPTER_VARIABLE,
    show_default=True,
    help="Whom to judge; 'upstream' is the installed transformer_lens' own.",
)
@click.option(
    "--profile",
    type=click.Choice(list(profiles.PROFILES)),
    default=profiles.DEFAULT_PROFILE,
    envvar=profiles.PROFILE_VARIABLE,
    show_default=True,
    help="ci: the same cases every time; dev: few random ones; deep: many random ones.",
)
@click.option("--examples", type=click.IntRange(min=1), help="Cases of a check of weight 1.")
@click.option(
    "--dtypes",
    metavar="NAME,NAME",
    default=",".join(DTYPES),
    envvar=profiles.DTYPES_VARIABLE,
    show_default=True,
    help="Draw models of these dtypes only.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Draw other cases: those of this seed.")
@click.option(
    "--ledger/--no-ledger",
    default=True,
    help="Whether what the ledger of known defects explains counts as known, or as failed.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Write all verdicts there, with every gap.",
)
@click.option(
    "--failures",
    type=click.Path(file_okay=False, path_type=Path),
    default=profiles.FAILURES,
    show_default=True,
    help="Where a failing check leaves its case.",
)
@real.options
@click.pass_context
def check(
    ctx: click.Context,
    checks: tuple[str, ...],
    adapter: str,
    profile: str,
    examples: int | None,
    dtypes: str,
    seed: int | None,
    ledger: bool,
    json_file: Path | None,
    failures: Path,
    model: str | None,
    dtype: str | None,
    device: str,
    text: str | None,
    tokens: int,
    gradients: str,
) -> None:
    """Judge an adapter under CHECKS: names, or surfaces (hooks is all of hooks.*); else all.

    With --model, judge it on one real checkpoint instead.
    """
    if model is not None:
        if checks:
            raise SpecError("model", model, f"without CHECKS, of which there is {checks[0]!r}")
        ctx.exit(
            real.check_model(
                model,
                adapter,
                dtype=dtype,
                device=device,
                text=text,
                tokens=tokens,
                gradients=gradients,
                seed=seed or 0,
                json_file=json_file,
            )
        )
    on = profiles.profile(profile)
    if examples is not None:
        on = dataclasses.replace(on, examples=examples)
    picked = ",".join(profiles.dtypes(dtypes))
    os.environ[profiles.DTYPES_VARIABLE] = picked  # where the strategies look
    get_ready()
    from conformance.run import iter_verdicts, load_adapter, select_checks, versions, write_case
    from conformance.verdict import ConformanceError

    judged, total = load_adapter(adapter), len(select_checks(checks))
    drawn = "the same cases every time" if on.deterministic else "random cases"
    if seed is not None:
        drawn = f"the cases of seed {seed}"
    click.echo(f"conformance of: {adapter}")
    click.echo("with: " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    click.echo(f"dtypes: {picked.replace(',', ', ')}")
    click.echo(f"profile: {on.name} ({on.examples} examples a check of weight 1, {drawn})\n")
    verdicts: list[Verdict] = []
    try:
        with Progress(total) as progress:
            for verdict in iter_verdicts(
                judged,
                checks=checks,
                on=on,
                seed=seed,
                ledger=ledger,
                starting=progress.starting,
                each=progress.advance,
            ):
                # First of all: an interrupt or a crash in a later check must not lose the case.
                if verdict.bad:
                    write_case(verdict, failures)
                verdicts.append(verdict)
                progress.done(verdict)
    finally:
        _print_table(verdicts)
        for verdict in verdicts:
            if verdict.bad:
                click.echo(f"{verdict.check}: {ConformanceError(verdict, str(failures))}\n")
        click.echo(closing(verdicts, total))
        if json_file is not None:
            report = {
                "adapter": adapter,
                "versions": versions(),
                "profile": dataclasses.asdict(on),
                "seed": seed,
                "ledger": ledger,
                "dtypes": picked.split(","),
                "complete": len(verdicts) == total,
                "conforms": len(verdicts) == total and not any(v.bad for v in verdicts),
                "verdicts": [_plain(verdict) for verdict in verdicts],
            }
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    ctx.exit(exit_code(verdicts))


def _first(verdict: Verdict) -> str:
    """Where a subject and the reference part, or why there is no saying: short, for the table."""
    if verdict.outcome.value == "known":
        return verdict.known_as
    if verdict.gaps:
        return f"{verdict.gaps[0].site}: {verdict.gaps[0].kind}"
    return textwrap.shorten(verdict.reason, 70, placeholder=" ...")


def _print_table(verdicts: Sequence[Verdict]) -> None:
    """One row a check, with its first gap below its name: 80 columns hold no fifth one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("check, and its first gap", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("cases", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    colours = {"passed": "green", "known": "yellow", "failed": "red", "errored": "red"}
    for verdict in verdicts:
        # Text is taken verbatim: a gap may hold square brackets, which rich would read as markup.
        told: list[RenderableType] = [Text(verdict.check)]
        if first := _first(verdict):
            told.append(Padding(Text(first), (0, 0, 0, 2)))
        outcome = Text(verdict.outcome.value, colours.get(verdict.outcome.value, ""))
        table.add_row(Group(*told), outcome, str(verdict.examples), f"{verdict.seconds:.1f}")
    Console(highlight=False).print(table)


def _plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it, which knows no infinity."""
    plain = dataclasses.asdict(verdict)
    plain["outcome"] = verdict.outcome.value
    plain["known"] = dict(verdict.known)
    for gap in plain["gaps"]:
        if gap["greatest"] is not None and not math.isfinite(gap["greatest"]):
            gap["greatest"] = str(gap["greatest"])
    return plain
