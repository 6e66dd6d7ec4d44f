"""``replay``: run one recorded case again."""

from __future__ import annotations

import click

from conformance.cli.base import BadInput, closing, exit_code, get_ready
from conformance.fields import SpecError
from conformance.locate import find


@click.command()
@click.argument("file")
@click.option("--adapter", metavar="MODULE:CLASS", help="Whom to judge, instead of the recorded.")
@click.option("--all", "every", is_flag=True, help="Judge the case under every check.")
@click.pass_context
def replay(ctx: click.Context, file: str, adapter: str | None, every: bool) -> None:
    """Run the case recorded in FILE again and print every gap, in the order of execution.

    FILE may also be history.json#RELEASE/CHECK, or known_defects.toml#DEFECT.
    """
    record = find(file).record
    get_ready()
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
    click.echo(closing(verdicts, len(verdicts)))
    ctx.exit(exit_code(verdicts))
