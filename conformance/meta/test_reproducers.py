"""Scripts that stand alone: those of the ledger, and those that are made of any case."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers.models.olmo import modeling_olmo

from conformance import cli
from conformance.checks import REGISTRY, judge
from conformance.cli.base import BadInput
from conformance.cli.reproduce import run_script
from conformance.compare import Gap
from conformance.data import FIXTURES
from conformance.fields import SpecError
from conformance.history.releases import RELEASES
from conformance.ledger import known, ledger
from conformance.locate import Found, find
from conformance.meta.test_cli import one_clear_line, recorded
from conformance.records import Record, loads
from conformance.reproduce import as_before, kept_of, script_of, smaller
from conformance.reproduce.script import MOST_LINES
from conformance.reproduce.templates import TEMPLATES
from conformance.run import load_adapter, versions
from conformance.spec import Case, Edit, ModelSpec, RunSpec
from conformance.verdict import Outcome, Verdict

COMMITTED = sorted((FIXTURES / "reproducers").glob("*.py"))
NEWEST = versions()["transformer-lens"] == RELEASES[-1]

# Runs scripts one after the other in a process that can import nothing of this project (torch alone
# takes seconds to import) and says how each ended. One thing they leave behind is put back.
DRIVER = """
import runpy, sys, warnings
sys.modules["conformance"] = sys.modules["adapter"] = None
import torch
from transformers.models.olmo import modeling_olmo
torch.set_num_threads(1)
warnings.simplefilter("ignore")
eager = modeling_olmo.eager_attention_forward
for path in sys.argv[1:]:
    modeling_olmo.eager_attention_forward = eager
    try:
        runpy.run_path(path, run_name="__main__")
        ended = "nothing"
    except SystemExit as end:
        ended = "shown" if end.code else "nothing"
    except BaseException as error:
        ended = f"raised {type(error).__name__}"
    print(f"ENDED {ended}", path, flush=True)
"""


def ended(paths: list[Path], folder: Path) -> dict[str, str]:
    """How each script ended."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    command = [sys.executable, str(driver), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    return {Path(line.split()[-1]).stem: " ".join(line.split()[1:-1]) for line in lines}


def stands_alone(script: str) -> bool:
    imported = {
        str(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(script))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    standard = {"copy", "io", "pathlib", "pickle", "tempfile"}
    with_transformers = {"safetensors", "tokenizers"}  # which cannot be without them
    return imported <= {
        *standard,
        *with_transformers,
        *("torch", "transformers", "transformer_lens"),
    }


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_script_is_short_and_stands_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert stands_alone(text)
    assert "xpected" in text
    issue = path.with_suffix(".md").read_text(encoding="utf-8")
    assert issue.startswith("# ")
    assert "**Expected:**" in issue
    assert f"[{path.name}]({path.name})" in issue


def verdict_of(check: str, case: Case, found: Found | None = None) -> Verdict:
    verdict = judge(REGISTRY[check], load_adapter("upstream"), case)
    return found.of_defect(verdict) if found is not None else verdict


def made() -> dict[str, str]:
    """A script of each check that has a template, from a witness that shows it."""
    scripts: dict[str, str] = {}
    for defect in ledger():
        for showing in defect.shows:
            if not (defect.releases & showing.releases).contains(RELEASES[-1]):
                continue
            for check in (set(showing.promises) & TEMPLATES.keys()) - scripts.keys():
                record = Record(case=showing.witness, check=check, adapter="upstream")
                found = Found(record, showing=showing)
                scripts[check] = script_of(verdict_of(check, showing.witness, found), versions())
    return scripts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How all scripts of this file ended, in one process."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, script in {**made(), **agreeing()}.items():
        assert stands_alone(script), name
        assert len(script.splitlines()) <= MOST_LINES
        (folder / f"{name}.py").write_text(script, encoding="utf-8")
    paths = [*COMMITTED, *sorted(folder.glob("*.py"))]
    how = ended(paths, folder)
    assert len(how) == len(paths)
    return how


@pytest.mark.skipif(not NEWEST, reason=f"they are of transformer_lens {RELEASES[-1]}")
def test_scripts_show_it_where_this_project_cannot_be_imported(results: dict[str, str]) -> None:
    showing = {name: end for name, end in results.items() if not name.startswith("agree")}
    assert len(showing) > len(COMMITTED) + 20
    mended = {
        Path(defect.reproducer).stem
        for defect in ledger()
        if defect.reproducer and not defect.releases.contains(RELEASES[-1])
    }
    assert {name for name, end in showing.items() if end == "nothing"} == mended
    assert showing["forward.logits"] == "shown"
    assert showing["unpicklable"] == "raised AttributeError"
    assert showing["stop_at_last_layer"] == "raised AssertionError"


def sound(case: Case, site: str, kind: str = "value", check: str = "hooks.values") -> str:
    """A script about a gap that is not there: two equal models."""
    gap = Gap(site, kind, "made up")
    return script_of(Verdict(check, "upstream", Outcome.FAILED, case, (gap,)), versions())


PLAIN = Case(model=ModelSpec(num_hidden_layers=2), run=RunSpec(seq_len=4))
ODD = Case(
    model=ModelSpec(
        head_dim=4,
        num_attention_heads=4,
        biases=("q", "o"),
        rope_type="llama3",
        tie_word_embeddings=True,
        attention_dropout=0.5,
        clip_qkv=0.3,
        dtype="float64",
    ),
    run=RunSpec(seq_len=4, training=True, padding="right", positions="shuffled"),
)


def edited(site: str, kind: str, seed: int = 3) -> Case:
    return replace(PLAIN, run=replace(PLAIN.run, edits=(Edit(site=site, kind=kind, seed=seed),)))


def agreeing() -> dict[str, str]:
    """Scripts about gaps that are not there, at every kind of place."""
    scripts = [
        sound(ODD, "logits"),
        sound(replace(PLAIN, run=RunSpec(seq_len=6, padding="gap")), "logits"),
        *(
            sound(PLAIN, f"blocks.1.{site}")
            for site in (
                "ln1.hook_in",
                "ln1.hook_scale",
                "attn.hook_in",
                "attn.q.hook_out",
                "attn.hook_cos",
                "attn.hook_rot_q",
                "attn.hook_rot_k",
                "attn.hook_pattern",
                "attn.o.hook_in",
            )
        ),
        *(
            sound(PLAIN, f"blocks.0.{site}", "gradient")
            for site in ("ln2.hook_in", "attn.q.hook_out", "mlp.gate.hook_in", "mlp.hook_out")
        ),
        *(
            sound(replace(PLAIN, model=ModelSpec()), f"blocks.0.attn.{site}", "gradient")
            for site in ("hook_in", "hook_rot_k")
        ),
        sound(PLAIN, "model.layers.1.self_attn.k_proj.weight", "gradient", "gradients.parameters"),
        sound(PLAIN, "rotary_emb.hook_sin", "shape"),
        *(
            sound(edited(site, kind), "logits", check="interventions.returned")
            for site, kind in (
                ("blocks.0.attn.q.hook_out", "one_head"),
                ("blocks.1.attn.hook_rot_k", "noise"),
                ("blocks.1.attn.hook_cos", "scale"),
                ("blocks.1.attn.hook_sin", "zero"),
                ("blocks.0.attn.o.hook_in", "replace"),
                ("blocks.0.mlp.hook_in", "one_row"),
                ("blocks.0.hook_out", "one_position"),
                ("blocks.0.attn.hook_in", "identity"),
                ("embed.hook_in", "scale"),
                ("embed.hook_out", "in_place"),
            )
        ),
    ]
    return {f"agree{at}": script for at, script in enumerate(scripts)}


def test_a_script_of_a_sound_bridge_shows_nothing(results: dict[str, str]) -> None:
    # The script and the kit must agree on what a site is, or a script shows what is not there.
    sound = {name: end for name, end in results.items() if name.startswith("agree")}
    assert set(sound.values()) == {"nothing"}, sound


@pytest.mark.parametrize(
    ("case", "site", "told"),
    [
        (replace(PLAIN, run=RunSpec(seq_len=4, chunks=2, use_cache=True)), "logits", "in chunks"),
        (edited("blocks.0.attn.hook_pattern", "zero"), "logits", "is not seen from outside"),
        (PLAIN, "blocks.0.attn.hook_attn_scores", "nothing of it can be seen from outside"),
        (replace(PLAIN, run=RunSpec(seq_len=30, batch=40)), "logits", "lines is too long: take a"),
    ],
)
def test_what_no_script_shows_is_said_in_one_line(case: Case, site: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        sound(case, site)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_check_without_a_template_has_a_plain_run() -> None:
    assert "patch.life" not in TEMPLATES
    plain = sound(PLAIN, "run 1, bridged: logits", check="patch.life")
    assert plain.partition("\n\n")[2] == sound(PLAIN, "logits").partition("\n\n")[2]


FAILED = Verdict("patch.life", "upstream", Outcome.FAILED, PLAIN, (Gap("logits", "value", "off"),))
ERRORED = Verdict(
    "patch.life", "upstream", Outcome.ERRORED, PLAIN, reason="running: KeyError: 'gone'"
)


@pytest.mark.parametrize(
    ("script", "verdict", "of_the_check", "shows"),
    [
        ("print('off'); raise SystemExit(1)", FAILED, False, True),
        ("raise SystemExit(0)", FAILED, True, False),
        ("pass", FAILED, True, False),
        ("raise KeyError('gone')", FAILED, True, True),
        ("raise KeyError('gone')", FAILED, False, False),  # a crash is another disagreement
        ("raise KeyError('gone')", ERRORED, False, True),
        ("raise KeyError('lost')", ERRORED, False, False),
        ("raise ValueError('gone')", ERRORED, False, False),
    ],
)
def test_a_script_must_show_what_the_case_does(
    script: str, verdict: Verdict, of_the_check: bool, shows: bool
) -> None:
    if shows:
        said = run_script(script, verdict, of_the_check=of_the_check)
        assert said.endswith(("off\n", "KeyError: 'gone'\n"))
    else:
        with pytest.raises(BadInput, match=r"^patch\.life: the script that was made does not show"):
            run_script(script, verdict, of_the_check=of_the_check)


def test_what_a_script_spies_in_is_put_back() -> None:
    eager = modeling_olmo.eager_attention_forward
    spies = "from transformers.models.olmo import modeling_olmo as m; m.eager_attention_forward = 0"
    run_script(f"{spies}; raise SystemExit(1)", FAILED, of_the_check=True)
    assert modeling_olmo.eager_attention_forward is eager


def test_the_ledger_keeps_a_script_of_what_is_known_and_of_nothing_else() -> None:
    check, defect = "alive.output_attentions", "no-output-attentions"
    known_here = known(check, upstream=True, release=None)
    bad = verdict_of(check, next(s for name, s in known_here.showings if name == defect).witness)
    kept = kept_of(bad, known_here)
    assert kept is not None
    assert kept.defect.id == defect
    assert kept.script in {path.read_text(encoding="utf-8") for path in COMMITTED}
    news = replace(bad, gaps=(Gap("logits", "value", "off"), *bad.gaps))
    assert kept_of(news, known_here) is None


@pytest.mark.skipif(not NEWEST, reason=f"they are of transformer_lens {RELEASES[-1]}")
@pytest.mark.parametrize(
    ("check", "defect"),
    [("flags.copies", "attn-in-ignores-groups"), ("text.loss", "appended-end-stays")],
)
def test_the_defect_that_is_asked_for_goes_first(check: str, defect: str) -> None:
    found = find(f"{FIXTURES}/known_defects.toml#{defect}/{check}")
    bad = verdict_of(check, found.record.case, found)
    known_here = known(check, upstream=True, release=None)
    kept = kept_of(bad, known_here, found.showing)
    assert kept is not None
    assert kept.defect.id == defect
    other = kept_of(bad, known_here)
    assert other is not None
    assert other.defect.id != defect  # which explains it as well


def test_what_a_script_need_not_say_is_left_out() -> None:
    def judged(case: Case) -> Verdict:
        bad = case.run.batch > 1 and "v" in case.model.biases
        gaps = (Gap(f"blocks.{case.model.num_hidden_layers - 1}.x", "value", "off"),) if bad else ()
        outcome = Outcome.FAILED if bad else Outcome.PASSED
        return Verdict("hooks.values", "upstream", outcome, case, gaps)

    big = Case(
        model=ModelSpec(num_hidden_layers=3, biases=("v",), clip_qkv=2.0, rope_type="yarn"),
        run=RunSpec(
            batch=3,
            seq_len=9,
            use_cache=True,
            chunks=3,
            training=True,
            edits=(Edit(site="blocks.0.hook_out"), Edit(site="blocks.2.hook_out")),
        ),
    )
    first = judged(big)
    left = smaller(first, judged, as_before(first)).case
    run = RunSpec(batch=3, seq_len=1, edits=(Edit(site="blocks.2.hook_out"),))
    # Three layers stay: there is an edit in the last of them.
    assert left == Case(model=ModelSpec(num_hidden_layers=3, biases=("v",)), run=run)


# --- the command


def test_the_command_writes_a_script_and_an_issue(tmp_path: Path) -> None:
    output = tmp_path / "it.py"
    place = f"{FIXTURES}/known_defects.toml#no-output-attentions"
    result = CliRunner().invoke(cli.main, ["reproduce", place, "-o", str(output), "--issue"])
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("lines; it says:\n0 attentions, expected 1\n")
    title = "output_attentions=True of the wrapped model returns no attentions"
    assert output.read_text(encoding="utf-8").startswith(f'"""{title}\n')
    issue = output.with_suffix(".md").read_text(encoding="utf-8")
    assert issue.startswith(f"# {title}\n\nHugging Face collects them by hooks")
    assert "\n0 attentions, expected 1\n" in issue


def test_the_command_prints_a_script_of_any_case(tmp_path: Path) -> None:
    path = recorded(tmp_path / "case.json", check="alive.output_attentions")
    result = CliRunner().invoke(cli.main, ["reproduce", str(path)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith('"""alive.output_attentions: attentions: count: 0 layers')
    assert stands_alone(result.stdout)
    # One layer is enough, and one token.
    assert "num_hidden_layers=1" in result.stdout
    assert "tokens = torch.tensor([[7]])" in result.stdout


def test_a_case_with_nothing_to_show_is_one_clear_line(tmp_path: Path) -> None:
    path = recorded(tmp_path / "case.json", check="hooks.names")
    told = one_clear_line(CliRunner().invoke(cli.main, ["reproduce", str(path)]))
    assert "hooks.names has nothing to show: passed with transformer_lens" in told
    result = CliRunner().invoke(cli.main, ["reproduce", str(path), "--issue"])
    assert result.exit_code == 2
    assert "--issue writes beside --output" in result.stderr
    record = loads(path.read_text(encoding="utf-8"))
    path.write_text(replace(record, check="copies.pickle").dumps(), encoding="utf-8")
    result = CliRunner().invoke(cli.main, ["reproduce", str(path), "-o", "no/where.py"])
    assert "there is no folder 'no'" in result.stderr


@pytest.mark.skipif(not NEWEST, reason=f"they are of transformer_lens {RELEASES[-1]}")
def test_a_case_that_no_script_is_made_of_has_that_of_its_known_defect(tmp_path: Path) -> None:
    output, name = tmp_path / "it.py", "value-bias-past-clamp"
    place = f"{FIXTURES}/known_defects.toml#{name}/processing.weights"
    result = CliRunner().invoke(cli.main, ["reproduce", place, "-o", str(output), "--issue"])
    assert result.exit_code == 0, result.output
    assert f"Instead, the script of the known defect {name}:" in result.stderr
    assert output.read_text(encoding="utf-8") in {path.read_text("utf-8") for path in COMMITTED}
    defect = next(each for each in ledger() if each.id == name)
    assert output.with_suffix(".md").read_text("utf-8").startswith(f"# {defect.title}\n")


@pytest.mark.skipif(not NEWEST, reason=f"they are of transformer_lens {RELEASES[-1]}")
def test_a_plain_run_that_crashes_otherwise_is_not_what_the_check_found() -> None:
    # Both raise a RuntimeError; the plain run's is about the score's scalar type, not the cache's.
    place = f"{FIXTURES}/known_defects.toml#float32-after-rope/caches.handed_over"
    result = CliRunner().invoke(cli.main, ["reproduce", place])
    assert result.exit_code == 0, result.output
    assert "Instead, the script of the known defect float32-after-rope:" in result.stderr


@pytest.mark.skipif(not NEWEST, reason=f"they are of transformer_lens {RELEASES[-1]}")
def test_a_case_of_a_check_without_a_template_is_shown_by_a_plain_run() -> None:
    place = f"{FIXTURES}/known_defects.toml#float32-after-rope/caching.unchanging"
    result = CliRunner().invoke(cli.main, ["reproduce", place])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert stands_alone(result.stdout)
