"""``reproduce``: a short script of its own from a case that fails."""

from __future__ import annotations

import io
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import click

from conformance.cli.base import BadInput, get_ready, json_file_in_a_folder
from conformance.locate import find


def _ended(script: str) -> tuple[bool, str]:
    """Whether a script shows a disagreement, and what it says."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return bool(end.code), said.getvalue()
    except Exception as error:
        return True, said.getvalue() + traceback.format_exception_only(error)[-1]
    return False, said.getvalue()


@click.command()
@click.argument("case")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=json_file_in_a_folder,
    help="Write the script there instead of printing it.",
)
@click.option("--title", default="", help="What it shows, as its first line.")
@click.option("--issue", is_flag=True, help="Write the text of an issue, too, beside the script.")
def reproduce(case: str, output: Path | None, title: str, issue: bool) -> None:
    """Write a script of at most 40 lines that shows what CASE shows, and says what was expected.

    It needs torch, transformers and transformer_lens, and nothing of this project. It is of
    transformer_lens' own adapter, whoever the case was recorded of. CASE is a case file, or
    known_defects.toml#DEFECT, or history.json#RELEASE/CHECK.
    """
    if issue and output is None:
        raise click.UsageError("--issue writes beside --output, which is missing")
    found = find(case)
    record = found.record
    get_ready()
    from conformance.checks import judge
    from conformance.reproduce import as_before, issue_of, script_of, smaller
    from conformance.run import load_adapter, select_checks, versions

    (check,) = select_checks([record.check])
    adapter, now = load_adapter("upstream"), versions()
    first = judge(check, adapter, record.case)
    if not first.bad:
        told = f"{check.name} has nothing to show: {first.outcome.value}"
        raise BadInput(f"{case}: {told} with transformer_lens {now['transformer-lens']}")
    if found.showing is None:
        verdict = smaller(first, lambda other: judge(check, adapter, other), as_before(first))
    else:
        verdict = found.of_defect(first)  # a witness is small, and may show other things as well
    title = title or found.title or f"{check.name}: {verdict.summary.splitlines()[0]}"
    expected = found.expected or check.promise
    script = script_of(verdict, now, title=title, expected=expected)
    shows, said = _ended(script)
    if not shows:
        raise BadInput(f"{case}: {check.name}: the script that was made does not show it:\n{said}")
    if output is None:
        click.echo(script, nl=False)
        return
    output.write_text(script, encoding="utf-8")
    click.echo(f"{output}: {script.count(chr(10))} lines; it says:\n{said}", nl=False)
    if issue:
        text = issue_of(title, found.reason, expected, said, output.name, now)
        output.with_suffix(".md").write_text(text, encoding="utf-8")
