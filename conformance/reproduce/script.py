"""A whole script: what it shows, the models, and the act of the check's template."""

from __future__ import annotations

import textwrap

from conformance.checks import REGISTRY
from conformance.fields import SpecError
from conformance.reproduce import special  # noqa: F401 - registers its templates
from conformance.reproduce.places import NoTemplateError
from conformance.reproduce.templates import TEMPLATES, Act, run
from conformance.reproduce.text import BUILDER, WIDTH, build, call, feed
from conformance.spec import Case
from conformance.verdict import Verdict

MOST_LINES = 40


def script_of(
    verdict: Verdict, versions: dict[str, str], *, title: str = "", expected: str = ""
) -> str:
    """A script that shows what a verdict found, with torch, transformers and transformer_lens only.

    It ends with 1, or with the exception that the bridge raises, where the disagreement is there.
    Of a check that has no template it shows a plain forward and backward, where the disagreement
    may be as well: whoever asks must run it.

    Args:
        verdict: A bad one, on a case, of transformer_lens' own adapter.
        versions: What it was found with.
        title: What it shows; the check and its first gap if empty.
        expected: What is due; the check's promise if empty.

    Raises:
        SpecError: If none can be written.
    """
    name = verdict.check
    assert verdict.case is not None
    about = title or f"{name}: {_short(verdict)}"
    above = _docstring(about, expected or REGISTRY[name].promise, versions)
    reason = "nothing of it can be seen from outside of Hugging Face's model"
    try:
        acts = TEMPLATES.get(name, run)(verdict.case, verdict)
        for act in [acts] if isinstance(acts, Act) else acts:
            lines = [*above, "", *_body(verdict.case, act)]
            if len(lines) <= MOST_LINES:
                return "\n".join(lines) + "\n"
            reason = f"a script of {len(lines)} lines is too long: take a smaller case"
    except NoTemplateError as none:
        reason = str(none)
    raise SpecError("case", f"{name}: {verdict.summary}", f"one that a script shows; {reason}")


def _body(case: Case, act: Act) -> list[str]:
    """Imports, models, inputs and act."""
    used = {**act.imports, BUILDER: ["build_bridge_from_module"]}
    used["transformers"] = [*act.imports.get("transformers", []), "OlmoConfig", "OlmoForCausalLM"]
    imported = [
        line
        for module in sorted(used)
        for line in call(f"from {module} import ", sorted(used[module]), "")
    ]
    return [
        *(f"import {module}" for module in sorted({"copy", *act.modules})),
        "",
        "import torch",
        *imported,
        "",
        *build(case),
        *(feed(case) if act.feeds else []),
        *act.lines,
    ]


def issue_of(
    title: str, reason: str, expected: str, said: str, script: str, versions: dict[str, str]
) -> str:
    """The text of an issue about what a script shows.

    Args:
        title: What is wrong.
        reason: Why, if that is known.
        expected: What is due instead.
        said: What the script prints.
        script: Its file's name.
        versions: What it was run with.
    """
    return "\n".join(
        [
            f"# {title}",
            "",
            *([reason, ""] if reason else []),
            f"**Expected:** {expected.rstrip('.')}.",
            "",
            f"**Seen** with {_seen_with(versions)}:",
            "",
            "```text",
            *(line.rstrip() for line in said.strip().splitlines()),
            "```",
            "",
            f"[{script}]({script}) shows it, with torch, transformers and transformer_lens only.",
            "",
        ]
    )


def _seen_with(versions: dict[str, str]) -> str:
    wanted = ("transformer-lens", "transformers", "torch")
    return ", ".join(f"{name} {versions[name]}" for name in wanted if name in versions)


def _short(verdict: Verdict) -> str:
    if not verdict.gaps:
        return verdict.reason.splitlines()[0]
    return f"{verdict.gaps[0].site}: {verdict.gaps[0].kind}"


def _docstring(title: str, expected: str, versions: dict[str, str]) -> list[str]:
    first = textwrap.shorten(title.replace("\\", "/"), WIDTH - 3, placeholder=" ...")
    told = f"Expected: {expected.rstrip('.')}. Seen with {_seen_with(versions)}."
    return [f'"""{first}', *textwrap.wrap(told, WIDTH, break_on_hyphens=False), '"""']
