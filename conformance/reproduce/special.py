"""The templates of checks that do something of their own with a bridge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from conformance.reproduce import text
from conformance.reproduce.places import NoTemplateError
from conformance.reproduce.templates import Act, crash, run, template
from conformance.spec import DTYPES, PROCESSING, Case
from conformance.tolerance import of_log_probabilities
from conformance.verdict import Outcome, Verdict

_FORWARD = "bridge(tokens)"


def _counted(site: str, before: list[str], act: list[str], due: str) -> list[str]:
    """How often a hook fires."""
    return [
        "fired = []",
        f'bridge.hook_dict["{site}"].add_hook(lambda x, hook: fired.append(hook.name))',
        *before,
        *act,
        f'print(f"{site} fired {{len(fired)}} times, expected: {due}")',
    ]


def _flags(detail: str) -> list[str]:
    return re.findall(r"use_\w+", detail)


@template("alive.advertised")
def advertised(case: Case, verdict: Verdict) -> Act | Iterator[Act]:
    """A hook that never fires, or goes silent under flags."""
    if verdict.outcome is Outcome.ERRORED:
        return run(case, verdict)
    gap = verdict.gaps[0]
    flags = _flags(gap.detail)
    if not flags:
        lines = _counted(gap.site, [], [_FORWARD], "once, or no such name")
        return Act([*lines, "raise SystemExit(not fired)"])
    lines = _counted(gap.site, [_FORWARD], [], "once, under these flags, too")
    lines[-1:-1] = [f"bridge.set_{flag}(True)" for flag in flags] + ["fired.clear()", _FORWARD]
    return Act([*lines, "raise SystemExit(len(fired) != 1)"])


@template("alive.output_attentions")
def output_attentions(case: Case, verdict: Verdict) -> Act:
    """The number of attentions that come back."""
    return Act(
        [
            "due = model(tokens, output_attentions=True).attentions",
            "got = bridge.original_model(tokens, output_attentions=True).attentions or ()",
            'print(f"{len(got)} attentions, expected {len(due)}")',
            "raise SystemExit(len(got) != len(due))",
        ]
    )


@template("biases.optional")
def optional(case: Case, verdict: Verdict) -> Act:
    """What a stacked accessor of a missing bias raises."""
    name = verdict.gaps[0].site
    if "instead of an AttributeError" not in verdict.gaps[0].detail:
        raise NoTemplateError(f"{name}: {verdict.gaps[0].detail}")
    said = f'print("expected: AttributeError, since the model has no {name[2:]} bias")'
    lines = [said, "try:", f"    bridge.{name}", "except AttributeError as error:"]
    return Act([*lines, "    print(error)"], feeds=False)


def _process(case: Case) -> list[str]:
    named = {name: name in case.run.processing for name in PROCESSING}
    start = "bridge.enable_compatibility_mode("
    return text.call(start, text.keywords({"disable_warnings": True, **named}))


def _log_probabilities(case: Case) -> list[str]:
    chosen = "" if case.run.padding == "none" else "[mask.bool()]"
    return [
        f"due, got = (x{chosen}.log_softmax(-1) for x in (due, got))",
        *text.verdict("log-probabilities", allowed=of_log_probabilities().atol),
    ]


@template("compatibility.log_probabilities")
def log_probabilities(case: Case, verdict: Verdict) -> Act:
    """Before and after weights are processed."""
    runs = [*text.run_model(case), *_process(case), *text.run_bridge(case)]
    if verdict.outcome is Outcome.ERRORED:
        return Act(runs)
    return Act([*runs, *_log_probabilities(case)])


@template("compatibility.value_biases")
def value_biases(case: Case, verdict: Verdict) -> Act:
    """What is left of a value bias."""
    case = replace(case, run=replace(case.run, processing=("fold_value_biases",)))
    if verdict.outcome is Outcome.ERRORED:
        return Act(_process(case), feeds=False)
    folded = case.model.clip_qkv is None
    due = "all zero" if folded else "as it was: a clamp follows it"
    return Act(
        [
            *_process(case),
            "got = bridge.blocks[0].attn.b_V",
            f'print("value bias after folding:", got, "expected: {due}")',
            f"raise SystemExit({'' if folded else 'not '}bool(got.any()))",
        ],
        feeds=False,
    )


@template("compatibility.refusal")
def refusal(case: Case, verdict: Verdict) -> Act:
    """Logits before and after a refusal."""
    if verdict.outcome is Outcome.ERRORED:
        return Act(crash(case))
    if verdict.gaps[0].site != "logits after a refusal":
        raise NoTemplateError(verdict.summary)
    return Act(
        [
            *text.run_bridge(case, "due = "),
            "try:",
            "    bridge.enable_compatibility_mode(refactor_factored_attn_matrices=True)",
            "except Exception as error:",
            '    print("refused:", str(error).splitlines()[0][:70])',
            *text.run_bridge(case),
            *text.verdict("logits after a refusal"),
        ]
    )


@template("compatibility.hooks")
def hooks(case: Case, verdict: Verdict) -> Act:
    """How often a hook fires once weights are processed."""
    if verdict.outcome is Outcome.ERRORED:
        return Act([*_process(case), *text.run_bridge(case, "")])
    lines = _counted(verdict.gaps[0].site, _process(case), [_FORWARD], "once")
    return Act([*lines, "raise SystemExit(len(fired) != 1)"])


@template("compatibility.trains")
def trains(case: Case, verdict: Verdict) -> Act:
    """Parameters that get no gradient."""
    if verdict.outcome is Outcome.ERRORED:
        return Act(_process(case), feeds=False)
    return Act(
        [
            *_process(case),
            "bridge(tokens).sum().backward()",
            "got = [name for name, each in bridge.named_parameters() if each.grad is None]",
            'print("without a gradient:", got, "expected: none")',
            "raise SystemExit(bool(got))",
        ]
    )


@template("configuration.truth")
def truth(case: Case, verdict: Verdict) -> Act:
    """A field of the configuration."""
    holder, _, name = verdict.gaps[0].site.rpartition(".")
    due = verdict.gaps[0].detail.rpartition("the model has ")[2]
    holder = re.sub(r"blocks\.(\d+)", r"blocks[\1]", holder)
    return Act(
        [
            f'got = getattr(bridge.{holder}, "{name}", "absent")',
            f'print(f"{holder}.{name}: {{got}}, expected {due}")',
            f"raise SystemExit(got != {due})",
        ],
        feeds=False,
    )


@template("copies.deepcopy")
def deepcopy(case: Case, verdict: Verdict) -> Act | Iterator[Act]:
    """What a copy does to its original."""
    if verdict.outcome is Outcome.ERRORED and "copy.deepcopy" in verdict.reason:
        lines = ["bridge(tokens).sum().backward()", "copy.deepcopy(bridge)"]
        return Act(lines)
    crossed = [gap for gap in verdict.gaps if "of the original fired" in gap.detail]
    if not crossed:
        return run(case, verdict)
    site = crossed[0].site
    lines = _counted(site, [_FORWARD, "other = copy.deepcopy(bridge)"], [], "never")
    lines[-1:-1] = ["bridge.set_use_hook_mlp_in(True)", "fired.clear()", "other(tokens)"]
    lines[-1] = lines[-1].replace(" times", " times in a forward of the copy")
    return Act([*lines, "raise SystemExit(bool(fired))"])


@template("copies.pickle")
def pickled(case: Case, verdict: Verdict) -> Act:
    """Pickling raises."""
    if verdict.outcome is Outcome.ERRORED:
        return Act(crash(case))
    said = 'print("expected: an equal bridge, or an error that names state_dict as the way")'
    if verdict.gaps[0].site == "pickle":
        return Act([said, "pickle.dumps(bridge)"], modules=("pickle",), feeds=False)
    return Act([said, "torch.save(bridge, io.BytesIO())"], modules=("io",), feeds=False)


@template("copies.state_dict")
def state_dict(case: Case, verdict: Verdict) -> Act | Iterator[Act]:
    """What one bridge's state dict leaves of another's weights."""
    if verdict.outcome is Outcome.ERRORED or "logits" in verdict.gaps[0].site:
        return run(case, verdict)
    return Act(
        [
            "saved = {name: each.clone() for name, each in bridge.state_dict().items()}",
            "for each in bridge.parameters():",
            "    each.data.zero_()",
            "bridge.load_state_dict(saved)",
            "due, got = (next(each.parameters()) for each in (model, bridge.original_model))",
            *text.verdict("embedding after load_state_dict"),
        ],
        feeds=False,
    )


@template("copies.cast")
def cast(case: Case, verdict: Verdict) -> Act:
    """Both models cast to another dtype."""
    there = DTYPES[(DTYPES.index(case.model.dtype) + 1) % len(DTYPES)]
    lines = [f"model.to(torch.{there}), bridge.to(torch.{there})"]
    if verdict.outcome is Outcome.ERRORED and there != "float32":
        return Act([*lines, *crash(case)])
    if verdict.outcome is Outcome.ERRORED or verdict.gaps[0].site.endswith(f"({case.model.dtype})"):
        lines.append(f"model.to(torch.{case.model.dtype}), bridge.to(torch.{case.model.dtype})")
    if verdict.outcome is Outcome.ERRORED:
        return Act([*lines, *crash(case)])
    return Act([*lines, *text.run_model(case), *text.run_bridge(case), *text.verdict("logits")])


@template("forward.loss")
def loss(case: Case, verdict: Verdict) -> Act:
    """The loss over pairs of real tokens."""
    pairs = "torch.ones_like(tokens[:, 1:]).bool()"
    if case.run.padding != "none":
        pairs = "(mask[:, :-1] * mask[:, 1:]).bool()"
    return Act(
        [
            *text.run_model(case, "logits = "),
            f"real = {pairs}",
            "due = torch.nn.functional.cross_entropy("
            "logits[:, :-1][real].float(), tokens[:, 1:][real])",
            'print("expected loss:", due.item())',
            'got = bridge(tokens, return_type="loss", GIVEN).float()'.replace(
                "GIVEN", text.given(case)
            ),
            *text.verdict("loss", allowed=1e-5),
        ]
    )


@template("hooks.names")
def names(case: Case, verdict: Verdict) -> Act:
    """A name that is not in hook_dict."""
    site = verdict.gaps[0].site
    if verdict.gaps[0].detail != "no hook point of this name":
        raise NoTemplateError(str(verdict.gaps[0]))
    said = f'print("{site} in hook_dict:", "{site}" in bridge.hook_dict, "expected: True")'
    return Act([said, f'raise SystemExit("{site}" not in bridge.hook_dict)'], feeds=False)


@template("layernorm.observed", "layernorm.second_derivatives")
def observed(case: Case, verdict: Verdict) -> Act | Iterator[Act]:
    """A backward hook inside a LayerNorm."""
    if verdict.outcome is not Outcome.ERRORED:
        return run(case, verdict)
    site = "ln_final.hook_scale"
    hook = f'bridge.hook_dict["{site}"].add_hook(lambda grad, hook: None, dir="bwd")'
    said = f'print("expected: a forward; the backward hook at {site} is there to look")'
    return Act([hook, said, _FORWARD])


@template("layernorm.incl_bwd")
def incl_bwd(case: Case, verdict: Verdict) -> Act:
    """Gradients in the cache."""
    asked = text.call(
        "_, cache = bridge.run_with_cache(",
        ["tokens", 'return_type="loss"', "incl_bwd=True", f"use_cache={case.run.use_cache}"],
    )
    said = 'print("expected: a cache with the gradient of every hook beside its value")'
    if verdict.outcome is Outcome.ERRORED:
        return Act([said, *asked])
    name = verdict.gaps[0].site
    told = f'print("{name} in the cache:", "{name}" in cache)'
    return Act([said, *asked, told, f'raise SystemExit("{name}" not in cache)'])


@template("precision.cache")
def cache(case: Case, verdict: Verdict) -> Act:
    """Keys or values that a cache holds after a forward."""
    filled = [
        "due, got = DynamicCache(config=config), DynamicCache(config=config)",
        "model(tokens, past_key_values=due, use_cache=True)",
        "bridge(tokens, past_key_values=got, use_cache=True)",
    ]
    if verdict.outcome is Outcome.ERRORED:
        return Act(filled, {"transformers": ["DynamicCache"]})
    _, layer, name = verdict.gaps[0].site.split(".")
    taken = f"due, got = (each.layers[{layer}].{name} for each in (due, got))"
    lines = [*filled, taken, *text.verdict(f"the cache's {name}")]
    return Act(lines, {"transformers": ["DynamicCache"]})


@template("precision.no_cache")
def no_cache(case: Case, verdict: Verdict) -> Iterator[Act]:
    """As any run, but that it has no cache."""
    return run(replace(case, run=replace(case.run, use_cache=False, chunks=1)), verdict)
