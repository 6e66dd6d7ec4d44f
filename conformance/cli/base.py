"""What every command shares: the exit codes, who is blamed, and what happens before torch."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conformance.fields import SpecError
from conformance.garbage import rarely_collected

if TYPE_CHECKING:
    from conformance.verdict import Verdict

CONFORMS, DOES_NOT_CONFORM, BAD_INPUT, KIT_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


class BadInput(click.ClickException):
    """One clear line, no usage text: the input is wrong, not the way the command was called."""

    exit_code = BAD_INPUT


class Main(click.Group):
    """Turns what a command raises into the exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was called."""
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


def get_ready() -> None:
    """Before torch is imported: no model hub, one thread, and adapters from the working folder."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    # A console script does not see the folder that it is called in. Last, to shadow nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    rarely_collected()
    import torch

    torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other


def json_file_in_a_folder(
    ctx: click.Context, option: click.Parameter, value: Path | None
) -> Path | None:
    """Find out now, not after minutes, that there is no folder for the report."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(value.parent)!r}")
    return value


def closing(verdicts: Sequence[Verdict], total: int) -> str:
    """The answer, and what it rests on."""
    counts = Counter(verdict.outcome.value for verdict in verdicts)
    cases = sum(verdict.examples for verdict in verdicts)
    seconds = sum(verdict.seconds for verdict in verdicts)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    answer = "conforms"
    if any(verdict.bad for verdict in verdicts):
        answer = "does not conform"
    elif any(verdict.known for verdict in verdicts):
        answer = "conforms but for what is known"
    if len(verdicts) < total:
        answer = f"incomplete, {len(verdicts)} of {total} checks"
    return f"{answer}: {told or 'nothing judged'}; {cases} cases in {seconds:.0f} s"


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Whether the adapter conforms, as the shell is told."""
    return DOES_NOT_CONFORM if any(verdict.bad for verdict in verdicts) else CONFORMS
