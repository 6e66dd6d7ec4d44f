"""``check --model``: judge an adapter on a real checkpoint, within the memory of one model."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from conformance.cli.base import CONFORMS, DOES_NOT_CONFORM, INTERRUPTED

if TYPE_CHECKING:
    from conformance.real import Report

MOST_SHOWN = 20  # gaps of a subject


def options(command: Any) -> Any:
    """The options of ``check`` that are about a checkpoint."""
    for option in reversed(
        (
            click.option(
                "--model",
                metavar="ID_OR_DIRECTORY",
                help="Judge this checkpoint instead of drawn models.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
                help="What to load the checkpoint as; its own dtype by default.",
            ),
            click.option("--device", default="cpu", show_default=True, help="Where to run it."),
            click.option("--text", help="Run it on this text, in its own tokenizer's tokens."),
            click.option(
                "--tokens",
                type=click.IntRange(min=2),
                default=16,
                show_default=True,
                help="Without a text: how many tokens are drawn.",
            ),
            click.option(
                "--gradients",
                type=click.Choice(["none", "slice", "all"]),
                default="slice",
                show_default=True,
                help="Of every site; and of the parameters of three layers, or of all.",
            ),
        )
    ):
        command = option(command)
    return command


class _Layers:
    """A bar a subject on a terminal, a line a subject elsewhere. Both on stderr."""

    def __init__(self, layers: int) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
        )
        self._layers, self._tasks = layers, dict[str, Any]()

    def __enter__(self) -> _Layers:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, subject: str, layer: int) -> None:
        if self._bar.disable:
            click.echo(f"{subject}: layer {layer} of {self._layers}", err=True)
            return
        if subject not in self._tasks:
            self._tasks[subject] = self._bar.add_task(f"{subject}, layers", total=self._layers)
        self._bar.update(self._tasks[subject], completed=layer)


def check_model(
    source: str,
    adapter: str,
    *,
    dtype: str | None,
    device: str,
    text: str | None,
    tokens: int,
    gradients: str,
    seed: int,
    json_file: Path | None,
) -> int:
    """Judge an adapter on a checkpoint and print what was found: the exit code."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    from conformance.checkpoint import find, return_memory, tokens_of
    from conformance.real import Report, judge_model
    from conformance.run import load_adapter, versions
    from conformance.subjects import SubjectError

    return_memory()
    judged = load_adapter(adapter)
    checkpoint = find(source, dtype=dtype, device=device)
    given = tokens_of(checkpoint, text=text, length=tokens, seed=seed)
    layers = checkpoint.config.num_hidden_layers
    click.echo(f"conformance of: {adapter}, on {source}")
    click.echo("with: " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    click.echo(
        f"{checkpoint.weight_bytes / 2**30:.2f} GiB of weights in "
        f"{str(checkpoint.dtype).removeprefix('torch.')}, {layers} layers, clip_qkv="
        f"{checkpoint.config.clip_qkv}; {given.shape[1]} tokens on {device}\n"
    )
    report, broken, interrupted, start = Report(), "", False, time.perf_counter()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="olmo-conformance-") as folder,
            _Layers(layers) as on,
        ):
            judge_model(
                checkpoint.load(),
                judged,
                given,
                Path(folder),
                gradients=gradients,
                report=report,
                on_layer=on,
            )
    except SubjectError as error:
        broken = str(error)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _print(report)
    bad = any(report.gaps.values()) or bool(broken)
    if broken:
        click.echo(f"errored: {broken}")
    for name, difference in report.measured.items():
        click.echo(f"not the same twice, so allowed twice as much: {name}: {difference:.1e}")
    answer = "does not conform" if bad else "conforms"
    if interrupted:
        answer = f"interrupted; so far it {answer}" if report.judged else "interrupted"
    click.echo(f"{answer}; {seconds:.0f} s, peak memory {peak:.2f} GiB")
    if json_file is not None:
        body = {
            "adapter": adapter,
            "model": source,
            "versions": versions(),
            "conforms": not bad and not interrupted,
            "interrupted": interrupted,
            "errored": broken,
            "seconds": seconds,
            "peak_memory_gib": peak,
            **dataclasses.asdict(report),
        }
        json_file.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    if interrupted:
        return INTERRUPTED
    return DOES_NOT_CONFORM if bad else CONFORMS


def _print(report: Report) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("subject, and its first gaps", overflow="fold")
    for name in ("tensors judged", "gaps"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, judged in report.judged.items():
        gaps = report.gaps[name]
        state = "" if name in report.complete else " (not to the end)"
        told = Text(f"{name}{state}")
        for gap in gaps[:MOST_SHOWN]:
            told.append(f"\n  {gap}")
        if len(gaps) > MOST_SHOWN:
            told.append(f"\n  and {len(gaps) - MOST_SHOWN} more")
        table.add_row(told, str(judged), str(len(gaps)))
    Console(highlight=False).print(table)
