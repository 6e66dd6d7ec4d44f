"""The command line: one command a module.

Whatever is slow to import (torch and all that stands on it) is imported inside the commands, once
their arguments are known to be good.
"""

from __future__ import annotations

import click

from conformance.cli.base import Main
from conformance.cli.bench import bench
from conformance.cli.check import check
from conformance.cli.history import history
from conformance.cli.mutants import mutants
from conformance.cli.replay import replay
from conformance.cli.reproduce import reproduce
from conformance.cli.soak import soak


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="olmo-conformance")
def main() -> None:
    """Judge an OLMo adapter for TransformerLens' TransformerBridge.

    Exit codes: 0 conforms, 1 does not, 2 bad usage or input, 3 olmo-conformance itself failed.
    """


for command in (check, replay, reproduce, mutants, soak, bench, history):
    main.add_command(command)
