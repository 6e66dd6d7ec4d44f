"""The ledger's vocabulary: what an entry explains, and that what it cannot say is refused."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from conformance.checks import REGISTRY, judge
from conformance.compare import Gap
from conformance.data import FIXTURES
from conformance.defects import Known, Showing
from conformance.fields import SpecError
from conformance.history.releases import RELEASES
from conformance.ledger import known, ledger, read
from conformance.run import load_adapter, versions
from conformance.spec import Case, Edit, ModelSpec, RunSpec, Step

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENTRY = """
[[defect]]
id = "narrow"
title = "Something is wrong"
reason = "It is so"
expected = "Something right"
subject = "upstream"
releases = ">=3.6,<4.2"
first_seen = "3.6.0"
"""
SHOWS = """
[[defect.shows]]
promises = ["hooks.values"]
witness = {}
gap = { kind = ["value"] }
"""


def showing(**fields: str) -> Showing:
    """The one showing of an entry, with some fields said otherwise, as TOML."""
    said = {
        "promises": '["hooks.values"]',
        "witness": "{}",
        "gap": '{ kind = ["value"] }',
        **fields,
    }
    lines = [f"{name} = {value}" for name, value in said.items() if value]
    (defect,) = read("\n".join([ENTRY, "[[defect.shows]]", *lines]))
    (only,) = defect.shows
    return only


CAST = (Step(kind="forward"), Step(kind="cast", dtype="float16"))
CLIPPED = Case(model=ModelSpec(clip_qkv=0.0, dtype="bfloat16", biases=("v", "o")))


@pytest.mark.parametrize(
    ("condition", "case", "meets"),
    [
        ('dtype = ["bfloat16"]', CLIPPED, True),
        ('dtype = ["bfloat16"]', Case(), False),
        ('dtype = { not = ["bfloat16"] }', CLIPPED, False),
        ("clip_qkv = true", CLIPPED, True),  # a clip of 0.0 is one
        ("clip_qkv = true", Case(), False),
        ("clip_qkv = false", Case(), True),
        ('biases = ["v", "q"]', CLIPPED, True),  # one of them is enough
        ('biases = ["q"]', CLIPPED, False),
        ('biases = { not = ["v"] }', CLIPPED, False),
        ("biases = true", CLIPPED, True),
        ("use_cache = true", Case(run=RunSpec(use_cache=True)), True),
        ("use_cache = false", Case(run=RunSpec(use_cache=True)), False),
        ('padding = ["left", "gap"]', Case(run=RunSpec(padding="gap")), True),
        ("grouped = true", Case(model=ModelSpec(num_key_value_heads=1)), True),
        ("grouped = true", Case(), False),
        ("square_o = false", Case(model=ModelSpec(head_dim=4)), True),
        ("square_mlp = true", Case(model=ModelSpec(intermediate_size=16)), True),
        ("square_unembed = true", Case(model=ModelSpec(vocab_size=16)), True),
        ("short = true", CLIPPED, True),
        ("short = true", Case(run=RunSpec(steps=CAST)), True),
        ("short = true", Case(run=RunSpec(steps=CAST[:1])), False),
        ('steps = ["cast"]', Case(run=RunSpec(steps=CAST)), True),
        ('steps = ["cast"]', Case(run=RunSpec(steps=CAST[:1])), False),
        ("clip_qkv = true, training = true", CLIPPED, False),  # all must hold
    ],
)
def test_conditions_on_the_case(condition: str, case: Case, meets: bool) -> None:
    conditions = tomllib.loads(f"it = {{ {condition} }}")["it"]
    assert replace(showing(), case=conditions).meets(case) is meets


def edited(site: str, kind: str) -> Case:
    return Case(run=RunSpec(edits=(Edit(site="logits"), Edit(site=site, kind=kind))))


def test_one_edit_must_meet_both_of_its_conditions() -> None:
    witness = '{ run = { edits = [{ site = "blocks.1.ln1.hook_in", kind = "in_place" }] } }'
    condition = '{ site = ["blocks.*.ln?.hook_in"], kind = ["in_place"] }'
    only = showing(edit=condition, witness=witness)
    assert only.meets(edited("blocks.0.ln2.hook_in", "in_place"))
    assert not only.meets(edited("blocks.0.ln2.hook_in", "scale"))
    assert not only.meets(edited("blocks.0.ln2.hook_out", "in_place"))
    assert not only.meets(edited("blocks.0.ln12.hook_in", "in_place"))
    assert not only.meets(Case())


FIRST = Gap("blocks.0.attn.hook_rot_q", "dtype", "float32 instead of bfloat16")
LATER = Gap("logits", "value", "all differ")
BEFORE = Gap("embed.hook_out", "value", "all differ")


def test_a_gap_is_explained_by_site_kind_and_text() -> None:
    exact = showing(
        gap='{ site = ["blocks.*.attn.hook_rot_?"], kind = ["dtype"], text = ["float32"] }'
    )
    assert exact.explains([BEFORE, FIRST, LATER]) == [False, True, False]
    assert showing(gap='{ kind = ["value"] }').explains([BEFORE, FIRST]) == [True, False]
    assert showing(gap='{ text = ["nothing"] }').explains([BEFORE, FIRST]) == [False, False]
    # A dot is a dot, and a bracket a bracket.
    assert showing(gap='{ site = ["logit."] }').explains([LATER]) == [False]
    heads = Gap("attentions[0]", "value", "")
    assert showing(gap='{ site = ["attentions[?]"] }').explains([heads]) == [True]


def test_a_gap_may_have_to_be_at_an_edit() -> None:
    only = showing(
        edit='{ kind = ["scale"] }',
        witness='{ run = { edits = [{ site = "logits" }] } }',
        gap='{ site = ["{edit}*"], kind = ["value"] }',
    )
    edits = (Edit(site="logits"), Edit(site="embed.hook_out", kind="in_place"))
    assert only.explains([BEFORE, LATER], edits) == [False, True]
    assert only.explains([LATER], edits[1:]) == [False]


def test_what_comes_later_is_explained_and_what_came_before_is_not() -> None:
    later = showing(gap='{ kind = ["dtype"] }', later="true")
    assert later.explains([BEFORE, FIRST, LATER, BEFORE]) == [False, True, True, True]
    assert later.explains([BEFORE, LATER]) == [False, False]


def test_an_error_is_explained_by_part_of_its_text() -> None:
    crash = showing(gap="", error='["same dtype", "Float"]')
    assert crash.is_error("running: RuntimeError: found Float")
    assert not crash.is_error("running: RuntimeError: other")
    assert crash.explains([FIRST]) == [False]


def test_gaps_are_sorted_into_known_ones_and_news() -> None:
    both = Known(
        (
            ("values", showing(gap='{ site = ["logits"] }')),
            ("dtypes", showing(gap='{ kind = ["dtype"] }')),
            ("elsewhere", showing(gap='{ kind = ["value"] }', case="{ training = false }")),
        )
    )
    trained = Case(run=RunSpec(training=True))
    assert both.sort(trained, (FIRST, LATER), "") == ([0, 1], ())
    assert both.sort(trained, (BEFORE, FIRST, LATER), "") == ([0, 1], (BEFORE,))
    assert both.sort(Case(), (BEFORE, LATER), "") == ([0, 2], ())
    assert both.sort(trained, (), "running: boom") == ([], ())


def test_an_entry_counts_in_its_releases_and_for_its_subject() -> None:
    text = ENTRY + SHOWS + 'releases = ">=4"\n' + SHOWS
    text += text.replace('"narrow"', '"wide"').replace('"upstream"', '"any"')
    among = read(text)

    def ids(
        release: str | None, *, upstream: bool = True, check: str = "hooks.values"
    ) -> list[str]:
        found = known(check, upstream=upstream, release=release, among=among)
        return [name for name, _ in found.showings]

    assert ids("3.6.0") == ["narrow", "wide"]
    assert ids("4.1.0") == ["narrow", "narrow", "wide", "wide"]
    assert ids("4.1.1.dev3") == ids(None) == ids("4.1.0")
    assert ids("4.2.0") == ids("3.5.1") == []
    assert ids("4.0.0", upstream=False) == ["wide", "wide"]
    assert ids("4.0.0", check="hooks.names") == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("\n[[defect]]", "it = 3\n[[defect]]"), "ledger.it=3: must be absent; known fields:"),
        (("[[defect]]", "[[defect"), "must be complete TOML"),
        (('id = "narrow"', ""), "ledger[0].id=None: must be a text"),
        (('"upstream"', '"ours"'), "ledger[narrow].subject='ours': must be one of"),
        (('">=3.6,<4.2"', '"3.6 to 4"'), "ledger[narrow].releases='3.6 to 4': must be versions as"),
        (('"3.6.0"', '"early"'), "ledger[narrow].first_seen='early': must be a version as PEP 440"),
        (("title =", "headline ="), "ledger[narrow].headline="),
        (('["hooks.values"]', "[]"), "ledger[narrow].shows[0].promises=[]: must be a list of"),
        (('["hooks.values"]', "3"), "ledger[narrow].shows[0].promises=3: must be a list of texts"),
        (("gap =", "gaps ="), "ledger[narrow].shows[0].gaps="),
        (("gap = { kind", "gap = { place"), "ledger[narrow].shows[0].gap.place="),
        (
            ('["value"]', '["values"]'),
            "ledger[narrow].shows[0].gap.kind=['values']: must be a choice",
        ),
        (('gap = { kind = ["value"] }', ""), "shows[0].gap=None: must be there, or error instead"),
        (("gap =", 'error = ["x"]\ngap ='), "must be there, or error instead"),
        (("gap =", "edit = {}\ngap ="), "shows[0].edit={}: must be a table with something in it"),
        (("gap =", 'edit = { kind = ["kick"] }\ngap ='), "shows[0].edit.kind=['kick']: must be"),
        (("gap =", "later = 1\ngap ="), "shows[0].later=1: must be true or false"),
        (("gap =", "case = { colour = true }\ngap ="), "shows[0].case.colour=True: must be absent"),
        (("gap =", "case = { dtype = 3 }\ngap ="), "shows[0].case.dtype=3: must be a list, {"),
        (("gap =", "case = { dtype = {} }\ngap ="), "shows[0].case.dtype={}: must be a list, {"),
        (("gap =", "case = { grouped = [1] }\ngap ="), "case.grouped=[1]: must be true or false"),
        (
            ("gap =", "case = { training = true }\ngap ="),
            "must be a case that meets the conditions",
        ),
        (("witness = {}", ""), "shows[0].witness=None: must be an object"),
        (("witness = {}", "witness = { model = { dtype = 1 } }"), "dtype=1: must be one of"),
        (("[[defect.shows]]", 'trigger = "x"\n[[defect.shows]]'), "a trigger in words instead"),
        (("[[defect]]", "[defect]"), "ledger.defect="),
    ],
)
def test_what_the_vocabulary_lacks_is_refused_in_one_line(
    change: tuple[str, str], told: str
) -> None:
    text = ENTRY + SHOWS
    assert change[0] in text
    with pytest.raises(SpecError) as caught:
        read(text.replace(*change))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value).replace("\\n", "")


def test_two_entries_of_one_id_are_refused() -> None:
    with pytest.raises(SpecError, match=r"ledger\[narrow\].id='narrow': must be no other entry's"):
        read(2 * (ENTRY + SHOWS))


# --- the fixtures' own


def test_every_promise_of_the_ledger_is_a_check() -> None:
    assert {name for defect in ledger() for name in defect.promises} <= set(REGISTRY)


def test_every_defect_of_the_newest_release_has_a_reproducer_and_an_issue() -> None:
    for defect in ledger():
        assert defect.releases.contains(str(defect.first_seen)), defect.id
        live = defect.releases.contains(RELEASES[-1])
        assert bool(defect.reproducer) >= live, defect.id
        if defect.reproducer:
            script = FIXTURES / defect.reproducer
            assert script.exists(), defect.id
            assert script.with_suffix(".md").exists(), defect.id
    named = {defect.reproducer for defect in ledger()} - {""}
    assert {f"reproducers/{path.name}" for path in (FIXTURES / "reproducers").glob("*.py")} == named


@pytest.mark.skipif(
    versions()["transformer-lens"] != RELEASES[-1], reason="the witnesses are of the newest release"
)
def test_every_way_to_show_is_shown_by_its_own_witness() -> None:
    """Under one of its checks; `--adapter upstream` has them all, and drawn cases beside them."""
    adapter, silent = load_adapter("upstream"), []
    for defect in ledger():
        for at, shows in enumerate(defect.shows):
            if not (defect.releases & shows.releases).contains(RELEASES[-1]):
                continue
            check = REGISTRY[shows.promises[-1]]
            verdict = judge(check, adapter, shows.witness)
            only = Known(((defect.id, shows),))
            met, _ = only.sort(shows.witness, verdict.gaps, verdict.reason)
            if not met:
                silent.append((defect.id, at, check.name))
    assert silent == []
