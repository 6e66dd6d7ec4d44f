"""pytest's side of the kit: options, header, and a case file for every failure.

It is loaded into every pytest run of an environment that has the kit, so it imports nothing heavy
and does nothing until conformance tests are run.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conformance.fields import SpecError
from conformance.profiles import (
    ADAPTER_VARIABLE,
    DATABASE_VARIABLE,
    DEFAULT_ADAPTER,
    DEFAULT_PROFILE,
    DTYPES_VARIABLE,
    FAILURES,
    LEDGER_OFF,
    LEDGER_VARIABLE,
    PROFILE_VARIABLE,
    PROFILES,
    chosen,
    chosen_dtypes,
    uses_ledger,
)
from conformance.spec import DTYPES

if TYPE_CHECKING:
    from collections.abc import Generator


def pytest_addoption(parser: pytest.Parser) -> None:
    """The kit's own options."""
    group = parser.getgroup("olmo-conformance")
    group.addoption(
        "--adapter",
        metavar="MODULE:CLASS",
        help="The OLMo architecture adapter to judge, or 'upstream' for the installed "
        f"transformer_lens' own (default: {DEFAULT_ADAPTER}).",
    )
    group.addoption(
        "--conformance-profile",
        choices=sorted(PROFILES),
        help="ci: the same cases every time; dev: few random ones; deep: many random ones "
        f"(default: {DEFAULT_PROFILE}).",
    )
    group.addoption(
        "--dtypes",
        metavar="NAME,NAME",
        help=f"Draw models of these dtypes only (default: {','.join(DTYPES)}).",
    )
    group.addoption(
        "--no-ledger",
        action="store_true",
        help="Fail on known defects, too: expect no failure that the ledger lists.",
    )
    group.addoption(
        "--example-database",
        metavar="URL_OR_FOLDER",
        help="Where the profiles dev and deep keep failing examples, for example "
        "redis://host:6379/0 for many machines (default: .hypothesis/examples).",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put the choices where every process of the run finds them, and refuse a bad adapter."""
    for option, variable in (
        ("--adapter", ADAPTER_VARIABLE),
        ("--conformance-profile", PROFILE_VARIABLE),
        ("--dtypes", DTYPES_VARIABLE),
        ("--example-database", DATABASE_VARIABLE),
    ):
        if config.getoption(option):
            os.environ[variable] = config.getoption(option)
    if config.getoption("--no-ledger"):
        os.environ[LEDGER_VARIABLE] = LEDGER_OFF
    if hasattr(config, "workerinput"):
        return
    try:
        chosen_dtypes()
        if config.getoption("--example-database"):
            from conformance.database import chosen_database

            chosen_database()
        if config.getoption("--adapter"):
            from conformance.run import load_adapter

            load_adapter(config.getoption("--adapter"))
    except SpecError as error:
        raise pytest.UsageError(str(error)) from None


def _concerned(config: pytest.Config) -> bool:
    """Whether this run is about conformance at all."""
    asked = any("conformance" in str(argument) for argument in config.args)
    return asked or (config.rootpath / "conformance" / "suite").is_dir()


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Subject, versions, dtypes and profile."""
    if not _concerned(config):
        return []
    profile = chosen()
    drawn = "the same cases every time" if profile.deterministic else "random cases"
    packages = ("transformer-lens", "transformers", "torch", "hypothesis")
    return [
        f"conformance of: {os.environ.get(ADAPTER_VARIABLE, DEFAULT_ADAPTER)}",
        "with: " + ", ".join(_version(name) for name in packages),
        f"dtypes: {', '.join(chosen_dtypes())}; profile: {profile.name} "
        f"({profile.examples} examples a check of weight 1, {drawn})",
        *([] if uses_ledger() else ["known defects: not expected (--no-ledger)"]),
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write the shrunk case of a failed check to the file that its message names."""
    report = yield
    error = call.excinfo.value if call.excinfo is not None else None
    verdict = getattr(error, "verdict", None)
    if verdict is not None:
        from conformance.run import write_case

        write_case(verdict, Path(item.config.invocation_params.dir) / FAILURES)
        report.user_properties.append(("conformance", verdict.check))
    return report
