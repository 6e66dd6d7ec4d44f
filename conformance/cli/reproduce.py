"""``reproduce``: a short script of its own from a case that fails."""

from __future__ import annotations

import io
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import click

from conformance.cli.base import BadInput, get_ready, json_file_in_a_folder
from conformance.locate import find

if TYPE_CHECKING:
    from conformance.verdict import Verdict


_TOLD = ("title", "expected", "reason")
_SHOWN = "a disagreement"


def _ended(script: str) -> tuple[str, str]:
    """How a script ends, with `_SHOWN`, an exception or nothing, and what it says.

    A script may spy in Hugging Face's own module: that is put back.
    """
    from transformers.models.olmo import modeling_olmo

    said = io.StringIO()
    try:
        with redirect_stdout(said), patch.dict(vars(modeling_olmo)):
            exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return _SHOWN if end.code else "", said.getvalue()
    except Exception as error:
        how = f"{type(error).__name__}: {error}"
        return how, said.getvalue() + traceback.format_exception_only(error)[-1]
    return "", said.getvalue()


def run_script(script: str, verdict: Verdict, *, of_the_check: bool) -> str:
    """What a script says that was made of a verdict.

    Args:
        script: It.
        verdict: On a case.
        of_the_check: Whether the check has a template. If not, the script must end as the check
            did: whatever else it raises is another disagreement.

    Raises:
        BadInput: If it does not show what the verdict does.
    """
    how, said = _ended(script)
    if not how or not (of_the_check or how == _SHOWN or how in verdict.reason):
        raise BadInput(f"{verdict.check}: the script that was made does not show it:\n{said}")
    return said


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
    known_defects.toml#DEFECT, or history.json#RELEASE/CHECK. Where no script can be made of it, and
    what it shows is a known defect, that defect's own script is written, and said to be so.
    """
    if issue and output is None:
        raise click.UsageError("--issue writes beside --output, which is missing")
    found = find(case)
    record = found.record
    get_ready()
    from conformance.checks import judge
    from conformance.fields import SpecError
    from conformance.reproduce import as_before, issue_of, kept_of, script_of, smaller
    from conformance.reproduce.templates import TEMPLATES
    from conformance.run import known_of, load_adapter, select_checks, versions

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
    expected, reason = found.expected or check.promise, found.reason
    try:
        script = script_of(verdict, now, title=title, expected=expected)
        said = run_script(script, verdict, of_the_check=check.name in TEMPLATES)
    except (SpecError, BadInput) as none:
        kept = kept_of(verdict, known_of(check, adapter), found.showing)
        if kept is None:
            raise
        click.echo(f"{none}\nInstead, the script of the known defect {kept.defect.id}:", err=True)
        script, said = kept.script, _ended(kept.script)[1]
        title, expected, reason = (getattr(kept.defect, name) for name in _TOLD)
    if output is None:
        click.echo(script, nl=False)
        return
    output.write_text(script, encoding="utf-8")
    click.echo(f"{output}: {script.count(chr(10))} lines; it says:\n{said}", nl=False)
    if issue:
        text = issue_of(title, reason, expected, said, output.name, now)
        output.with_suffix(".md").write_text(text, encoding="utf-8")
