"""Run checks over drawn cases: the one engine behind pytest, the command line and plain Python."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.errors import FlakyFailure
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.checks import REGISTRY, Check
from conformance.checks.registry import Adapter, adapter_name
from conformance.compare import Gap
from conformance.database import chosen_database
from conformance.defects import Known
from conformance.draws import drawing
from conformance.fields import SpecError
from conformance.ledger import known
from conformance.profiles import ADAPTER_VARIABLE, DEFAULT_ADAPTER, Profile, chosen, profile
from conformance.spec import Case
from conformance.trial import Trial
from conformance.verdict import ConformanceError, Verdict

UPSTREAM = "transformer_lens.model_bridge.supported_architectures.olmo:OlmoArchitectureAdapter"
_FORM = "MODULE:CLASS, or upstream for the installed transformer_lens' own"


def load_adapter(name: str) -> Adapter:
    """The adapter class of a name.

    Args:
        name: ``module:Class``, or ``upstream``.

    Raises:
        SpecError: If there is no such module or class, or it is no `ArchitectureAdapter`.
    """
    module_name, colon, class_name = (UPSTREAM if name == "upstream" else name).partition(":")
    if not (module_name and colon and class_name):
        raise SpecError("adapter", name, _FORM)
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported is its own fault
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise SpecError("adapter", name, f"{_FORM}; cannot import: {kind}{error}") from None
    found = getattr(module, class_name, None)
    if found is None:
        raise SpecError("adapter", name, f"{_FORM}; {module_name} has no {class_name}")
    if not (inspect.isclass(found) and issubclass(found, ArchitectureAdapter)):
        allowed = "a subclass of transformer_lens' ArchitectureAdapter"
        raise SpecError("adapter", name, allowed)
    return found


def selected_adapter() -> Adapter:
    """The adapter that the environment names (the pytest plugin puts it there), or ours."""
    return load_adapter(os.environ.get(ADAPTER_VARIABLE, DEFAULT_ADAPTER))


def select_checks(names: Iterable[str]) -> list[Check]:
    """Checks by name or by surface (``hooks`` is all of ``hooks.*``); all of them if none is named.

    Raises:
        SpecError: If a name matches none.
    """
    names = list(names)
    picked = dict.fromkeys(REGISTRY.values()) if not names else {}
    for name in names:
        matching = [c for c in REGISTRY.values() if c.name == name or c.name.split(".")[0] == name]
        if not matching:
            raise SpecError("check", name, f"one of {sorted(REGISTRY)}")
        picked.update(dict.fromkeys(matching))
    return list(picked)


def property_settings(check: Check, on: Profile | None = None) -> settings:
    """Hypothesis' settings of a check under a profile; the chosen one if none is given."""
    on = on or chosen()
    # Said in full, for Hypothesis' own defaults are others where CI is set in the environment.
    return settings(
        max_examples=max(1, round(on.examples * check.examples)),
        stateful_step_count=on.steps,
        derandomize=on.deterministic,
        database=chosen_database() if on.stores else None,
        deadline=None,
        print_blob=not on.deterministic,
        report_multiple_bugs=False,
        # Explaining a failure traces every line of torch's Python: minutes for each.
        phases=[phase for phase in Phase if phase is not Phase.explain],
        # A case builds whole models: slow by nature.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def versions() -> dict[str, str]:
    """The versions of what is judged and what judges."""
    found = {}
    for name in ("olmo-conformance", "transformer-lens", "transformers", "torch", "hypothesis"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_case(verdict: Verdict, folder: Path) -> Path:
    """Put a verdict's case on file, where the verdict's replay line looks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / verdict.file_name
    path.write_text(verdict.record(versions()).dumps(), encoding="utf-8")
    return path


def known_of(check: Check, adapter: Adapter) -> Known:
    """What the ledger knows of an adapter under a check, in the installed transformer_lens."""
    release = versions()["transformer-lens"]
    return known(check.name, upstream=adapter_name(adapter) == UPSTREAM, release=release)


def run_check(
    check: Check,
    adapter: Adapter,
    *,
    on: Profile,
    seed: int | None = None,
    each: Callable[[], None] = lambda: None,
    known: Known | None = None,
) -> Verdict:
    """Judge the recorded cases, then draw others, until one shows what is not known: it is shrunk.

    Args:
        check: What to judge.
        adapter: Whom.
        on: How many cases, and whether they are the same every time.
        seed: Seed of the draws, instead of the profile's.
        each: Called after every case.
        known: What the ledger knows; nothing if None.
    """
    trial, start = Trial(check, adapter, known), time.perf_counter()

    def one(case: Case) -> None:
        try:
            trial.judge(case)
        finally:
            each()

    bound = settings(property_settings(check, on), verbosity=Verbosity.quiet, database=None)
    try:
        for case in trial.firsts:
            one(case)
        drawing(one, check.cases(), bound, seed=seed)()
        verdict = trial.verdict()
    except ConformanceError as error:
        verdict = replace(error.verdict, known=trial.told)
    except FlakyFailure as error:
        verdict = replace(_once_only(error), known=trial.told)
    seconds = time.perf_counter() - start
    return replace(verdict, examples=trial.examples, seconds=seconds)


def _once_only(flaky: FlakyFailure) -> Verdict:
    """The verdict on a case that has failed in one run, and not in the next.

    Raises:
        FlakyFailure: If it is not the adapter that has.
    """
    for error in flaky.exceptions:
        if isinstance(error, ConformanceError):
            more = Gap("the same case again", "contract", "it fails in one run and not in the next")
            return replace(error.verdict, gaps=(*error.verdict.gaps, more))
    raise flaky


def check_adapter(
    adapter: Adapter | str = DEFAULT_ADAPTER,
    *,
    checks: Iterable[str] = (),
    profile_name: str = "ci",
    seed: int | None = None,
    ledger: bool = True,
) -> list[Verdict]:
    """Judge an adapter, with no pytest: the same checks, cases and verdicts.

    Args:
        adapter: An `ArchitectureAdapter` subclass, its ``module:Class``, or ``upstream``.
        checks: Names of checks or of surfaces; all if empty.
        profile_name: ``ci``, ``dev`` or ``deep``.
        seed: Seed of the draws; None leaves it to the profile (``ci`` always draws the same).
        ledger: Whether what the ledger of known defects explains counts as known, not as failed.

    Returns:
        One verdict a check, in the registry's order.

    Raises:
        SpecError: If the adapter, a check or the profile does not exist.
    """
    on = profile(profile_name)
    return list(iter_verdicts(adapter, checks=checks, on=on, seed=seed, ledger=ledger))


def iter_verdicts(
    adapter: Adapter | str,
    *,
    checks: Iterable[str],
    on: Profile,
    seed: int | None,
    ledger: bool = True,
    starting: Callable[[Check, int], None] = lambda check, examples: None,
    each: Callable[[], None] = lambda: None,
) -> Iterator[Verdict]:
    """As `check_adapter`, one verdict at a time, with word of what starts and what is done."""
    judged = load_adapter(adapter) if isinstance(adapter, str) else adapter
    for check in select_checks(checks):
        starting(check, property_settings(check, on).max_examples)
        known = known_of(check, judged) if ledger else None
        yield run_check(check, judged, on=on, seed=seed, each=each, known=known)
