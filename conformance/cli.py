"""The command line: judge an adapter, or run one recorded case again.

Whatever is slow to import (torch and all that stands on it) is imported inside the commands, once
their arguments are known to be good.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from conformance import profiles
from conformance.spec import DTYPES, SpecError, load

if TYPE_CHECKING:
    from conformance.checks import Check
    from conformance.verdict import Verdict

CONFORMS, DOES_NOT_CONFORM, BAD_INPUT, KIT_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


class BadInput(click.ClickException):
    """One clear line, no usage text: the input is wrong, not the way the command was called."""

    exit_code = BAD_INPUT


class _Main(click.Group):
    """Turns what a command raises into the exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except SpecError as error:
            raise BadInput(str(error)) from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception:
            traceback.print_exc(limit=-5)
            click.echo("this is a fault of olmo-conformance, not of the adapter", err=True)
            ctx.exit(KIT_FAILED)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="olmo-conformance")
def main() -> None:
    """Judge an OLMo adapter for TransformerLens' TransformerBridge.

    Exit codes: 0 conforms, 1 does not, 2 bad usage or input, 3 olmo-conformance itself failed.
    """


def _get_ready() -> None:
    """Before torch is imported: no model hub, one thread, and adapters from the working folder."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    # A console script does not see the folder that it is called in. Last, to shadow nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    import torch

    torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other


def _json_file(ctx: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    """Find out now, not after minutes, that there is no folder for the report."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(value.parent)!r}")
    return value


@main.command()
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
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_json_file,
    help="Write all verdicts there, with every gap.",
)
@click.option(
    "--failures",
    type=click.Path(file_okay=False, path_type=Path),
    default=profiles.FAILURES,
    show_default=True,
    help="Where a failing check leaves its case.",
)
@click.pass_context
def check(
    ctx: click.Context,
    checks: tuple[str, ...],
    adapter: str,
    profile: str,
    examples: int | None,
    dtypes: str,
    seed: int | None,
    json_file: Path | None,
    failures: Path,
) -> None:
    """Judge an adapter under CHECKS: names, or surfaces (hooks is all of hooks.*); else all."""
    on = profiles.profile(profile)
    if examples is not None:
        on = dataclasses.replace(on, examples=examples)
    picked = ",".join(profiles.dtypes(dtypes))
    os.environ[profiles.DTYPES_VARIABLE] = picked  # where the strategies look
    _get_ready()
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
        with _Progress(total) as progress:
            for verdict in iter_verdicts(
                judged,
                checks=checks,
                on=on,
                seed=seed,
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
        click.echo(_closing(verdicts, total))
        if json_file is not None:
            report = {
                "adapter": adapter,
                "versions": versions(),
                "profile": dataclasses.asdict(on),
                "seed": seed,
                "dtypes": picked.split(","),
                "complete": len(verdicts) == total,
                "conforms": len(verdicts) == total and not any(v.bad for v in verdicts),
                "verdicts": [_plain(verdict) for verdict in verdicts],
            }
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    ctx.exit(_exit_code(verdicts))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--adapter", metavar="MODULE:CLASS", help="Whom to judge, instead of the recorded.")
@click.option("--all", "every", is_flag=True, help="Judge the case under every check.")
@click.pass_context
def replay(ctx: click.Context, file: Path, adapter: str | None, every: bool) -> None:
    """Run the case recorded in FILE again and print every gap, in the order of execution."""
    record = load(file)
    _get_ready()
    from conformance.checks import judge
    from conformance.run import load_adapter, select_checks, versions

    recorded = select_checks([record.check])
    others = [check for check in select_checks(()) if check not in recorded] if every else []
    try:
        judged = load_adapter(adapter or record.adapter)
    except SpecError as error:
        if adapter:
            raise
        raise BadInput(f"{error}; it was recorded so: name another with --adapter") from None
    click.echo(f"{file}: {record.check} of {adapter or record.adapter}")
    now = versions()
    for name, was in record.versions.items():
        if now.get(name) != was:
            click.echo(f"recorded with {name} {was}, now {now.get(name, 'unknown')}")
    verdicts = []
    for check in [*recorded, *others]:
        try:
            verdict = judge(check, judged, record.case)
        except Exception as error:
            # A check may count on what its own cases always have: a clip, an edit.
            if check in recorded:
                raise
            click.echo(f"{check.name}: not for this case ({type(error).__name__}: {error})")
            continue
        verdicts.append(verdict)
        click.echo(
            f"{check.name}: {verdict.outcome.value}{verdict.reason and ': '}{verdict.reason}"
        )
        for gap in verdict.gaps:
            click.echo(f"  {gap}")
    click.echo(_closing(verdicts, len(verdicts)))
    ctx.exit(_exit_code(verdicts))


class _Progress:
    """What is being judged: a bar on a terminal, a line a check elsewhere. Both on stderr."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
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

    def __enter__(self) -> _Progress:
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


def _first(verdict: Verdict) -> str:
    """Where a subject and the reference part, or why there is no saying: short, for the table."""
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
    colours = {"passed": "green", "failed": "red", "errored": "red"}
    for verdict in verdicts:
        # Text is taken verbatim: a gap may hold square brackets, which rich would read as markup.
        told: list[RenderableType] = [Text(verdict.check)]
        if first := _first(verdict):
            told.append(Padding(Text(first), (0, 0, 0, 2)))
        outcome = Text(verdict.outcome.value, colours.get(verdict.outcome.value, ""))
        table.add_row(Group(*told), outcome, str(verdict.examples), f"{verdict.seconds:.1f}")
    Console(highlight=False).print(table)


def _closing(verdicts: Sequence[Verdict], total: int) -> str:
    """The answer, and what it rests on."""
    counts = Counter(verdict.outcome.value for verdict in verdicts)
    cases = sum(verdict.examples for verdict in verdicts)
    seconds = sum(verdict.seconds for verdict in verdicts)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    answer = "does not conform" if any(verdict.bad for verdict in verdicts) else "conforms"
    if len(verdicts) < total:
        answer = f"incomplete, {len(verdicts)} of {total} checks"
    return f"{answer}: {told or 'nothing judged'}; {cases} cases in {seconds:.0f} s"


def _exit_code(verdicts: Sequence[Verdict]) -> int:
    return DOES_NOT_CONFORM if any(verdict.bad for verdict in verdicts) else CONFORMS


def _plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it, which knows no infinity."""
    plain = dataclasses.asdict(verdict)
    plain["outcome"] = verdict.outcome.value
    for gap in plain["gaps"]:
        if gap["greatest"] is not None and not math.isfinite(gap["greatest"]):
            gap["greatest"] = str(gap["greatest"])
    return plain
