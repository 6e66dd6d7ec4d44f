"""A tapped reference is the bare one, and what its sites show and take is what they say.

The oracle here is `Scratch`, an OLMo written in plain torch from its definition. It shares no line
with Hugging Face or with the taps, so it rounds differently: it is compared with an allowance, and
everything else bit for bit.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from conformance import taps
from conformance.compare import compare_gradients, compare_values
from conformance.edits import edited
from conformance.inputs import derived_positions, inputs
from conformance.observe import observe
from conformance.recorder import Observation
from conformance.sites import Site, observable
from conformance.spec import DTYPES, EDITS, Case, Edit, ModelSpec, RunSpec
from conformance.strategies import cases, clip_present, edits, model_specs, run_specs
from conformance.subjects import Subject, hf_model, reference
from conformance.taps import Taps

torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other

CLIPPED = tuple(f"blocks.{{i}}.attn.hook_{letter}_clipped" for letter in "qkv")

quick = settings(derandomize=True, database=None, deadline=None, max_examples=25)

# Every odd setting at once: groups, an overridden head_dim, some biases, a clip that binds.
ODD = Case(
    model=ModelSpec(
        hidden_size=10,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        clip_qkv=0.7,
        biases=("q", "v"),
        weight_seed=5,
    ),
    run=RunSpec(batch=2, seq_len=5, padding="gap", token_seed=3),
)


def all_sites(model: ModelSpec) -> dict[str, Site]:
    return observable(model, CLIPPED)


def tapped(case: Case, backward: bool = True) -> Observation:
    return observe(reference(case.model), case, sites=all_sites(case.model), backward=backward)


def bare(case: Case) -> Observation:
    """The reference with nothing of the kit's on it."""
    return observe(reference(case.model), case)


def with_edits(case: Case, *made: Edit) -> Case:
    return dataclasses.replace(case, run=dataclasses.replace(case.run, edits=made))


def softmax(x: torch.Tensor) -> torch.Tensor:
    x = (x - x.amax(-1, keepdim=True)).exp()
    return x / x.sum(-1, keepdim=True)


class Scratch:
    """An OLMo in plain torch: no module, no fused kernel, no cache.

    Attributes:
        values: Each site's tensor, in order.
        gradients: Each site's gradient of the probed logits, after a backward pass.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.weights = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in hf_model(case.model).named_parameters()
        }
        self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.edits = {edit.site: edit for edit in case.run.edits}
        self.data = inputs(case)
        self.values: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.logits = self.forward()

    def see(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Edit and keep a site's tensor."""
        if name in self.edits:
            x = edited(self.edits[name], x)
        x = x.view_as(x)
        self.values[name] = x.detach()
        if x.requires_grad:
            x.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self.gradients.update({name: gradient})
            )
        return x

    def linear(self, name: str, module: str, x: torch.Tensor, heads: int = 0) -> torch.Tensor:
        """A projection, its output split into heads if there are any."""
        x = self.see(f"{name}.hook_in", x).flatten(2)
        y = x @ self.weights[f"{module}.weight"].T + self.weights.get(f"{module}.bias", 0)
        return self.see(f"{name}.hook_out", y.reshape(*y.shape[:2], heads, -1) if heads else y)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = self.see(f"{name}.hook_in", x)
        x = x - x.mean(-1, keepdim=True)
        scale = self.see(f"{name}.hook_scale", ((x * x).mean(-1, keepdim=True) + 1e-5) ** 0.5)
        return self.see(f"{name}.hook_out", self.see(f"{name}.hook_normalized", x / scale))

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``[batch, pos, head, d_head]``: the entries i and i + d_head/2 are turned together."""
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos[:, :, None] + turned * sin[:, :, None]

    def attention(
        self, name: str, module: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        model = self.case.model
        n_heads, n_kv, clip = model.num_attention_heads, model.num_key_value_heads, model.clip_qkv
        x = self.see(f"{name}.hook_in", x)
        q, k, v = (
            self.linear(f"{name}.{letter}", f"{module}.{letter}_proj", x, heads)
            for letter, heads in (("q", n_heads), ("k", n_kv), ("v", n_kv))
        )
        if clip is not None:
            q, k, v = (y.clamp(-clip, clip) for y in (q, k, v))
        q, k, v = (
            self.see(f"{name}.hook_{letter}_clipped", y)
            for letter, y in zip("qkv", (q, k, v), strict=True)
        )
        cos, sin = self.see(f"{name}.hook_cos", cos), self.see(f"{name}.hook_sin", sin)
        q = self.see(f"{name}.hook_rot_q", self.rotated(q, cos, sin))
        k = self.see(f"{name}.hook_rot_k", self.rotated(k, cos, sin))
        q = q.reshape(
            *q.shape[:2], n_kv, -1, model.d_head
        )  # a key-value head serves the query heads that follow it
        scores = torch.einsum("bqgnd,bkgd->bgnqk", q, k).flatten(1, 2) / model.d_head**0.5
        scores = self.see(f"{name}.hook_attn_scores", scores + self.mask)
        pattern = self.see(f"{name}.hook_pattern", softmax(scores))
        weights = pattern.reshape(len(x), n_kv, -1, *pattern.shape[2:])
        z = torch.einsum("bgnqk,bkgd->bqgnd", weights, v).flatten(2, 3)
        return self.see(f"{name}.hook_out", self.linear(f"{name}.o", f"{module}.o_proj", z))

    def mlp(self, name: str, module: str, x: torch.Tensor) -> torch.Tensor:
        x = self.see(f"{name}.hook_in", x)
        gate = self.linear(f"{name}.gate", f"{module}.gate_proj", x)
        up = self.linear(f"{name}.in", f"{module}.up_proj", x)
        down = self.linear(f"{name}.out", f"{module}.down_proj", gate * gate.sigmoid() * up)
        return self.see(f"{name}.hook_out", down)

    def hidden_from_each_other(self) -> torch.Tensor:
        """``[batch, 1, query, key]``: 0 where a query sees a key, the least number elsewhere."""
        length = self.case.run.seq_len
        sees = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if self.data.attention_mask is not None:
            sees = sees & (self.data.attention_mask[:, None, None] == 1)
        least = torch.finfo(torch.float32).min
        return torch.zeros(sees.shape).masked_fill(~sees, least)

    def angles(self) -> torch.Tensor:
        """``[batch, pos, d_head]``: by how much each pair of entries turns."""
        positions = self.data.position_ids
        if positions is None and self.data.attention_mask is not None:
            positions = derived_positions(self.data.attention_mask)
        if positions is None:
            positions = torch.arange(self.case.run.seq_len)[None]
        d_head, theta = self.case.model.d_head, self.case.model.rope_theta
        speeds = theta ** -(torch.arange(0, d_head, 2) / d_head)
        return (positions[..., None] * speeds).repeat(1, 1, 2)

    def forward(self) -> torch.Tensor:
        self.mask = self.hidden_from_each_other()
        tokens = self.see("embed.hook_in", self.data.tokens)
        rows = self.weights["model.embed_tokens.weight"][tokens]
        # Hugging Face's embedding never trains the row of the pad token.
        if (pad := self.case.model.pad_token_id) is not None:
            rows = torch.where(tokens[..., None] == pad, rows.detach(), rows)
        x = self.see("embed.hook_out", rows)
        self.see("rotary_emb.hook_in", x)
        cos = self.see("rotary_emb.hook_cos", self.angles().cos())
        sin = self.see("rotary_emb.hook_sin", self.angles().sin())
        for i in range(self.case.model.num_hidden_layers):
            block, layer = f"blocks.{i}", f"model.layers.{i}"
            x = self.see(f"{block}.hook_in", x)
            normed = self.norm(f"{block}.ln1", x)
            x = x + self.attention(f"{block}.attn", f"{layer}.self_attn", normed, cos, sin)
            x = x + self.mlp(f"{block}.mlp", f"{layer}.mlp", self.norm(f"{block}.ln2", x))
            x = self.see(f"{block}.hook_out", x)
        return self.linear("unembed", "lm_head", self.norm("ln_final", x))


def close(expected: torch.Tensor, actual: torch.Tensor, what: str) -> None:
    """Both in float32, in another order of summation: 1e-3 of the tensor's own scale."""
    usual = expected[expected.abs() < 1e30].abs()
    allowed = 1e-6 + 1e-3 * (float(usual.max()) if usual.numel() else 0.0)
    torch.testing.assert_close(
        actual, expected, rtol=1e-3, atol=allowed, msg=lambda message: f"{what}: {message}"
    )


def same(expected: Observation, actual: Observation) -> None:
    """Logits and every parameter's gradient, bit for bit."""
    assert torch.equal(expected.logits, actual.logits)
    assert expected.parameter_gradients.keys() == actual.parameter_gradients.keys()
    for name, gradient in expected.parameter_gradients.items():
        other = actual.parameter_gradients[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_tapped_is_bare(dtype: str) -> None:
    @quick
    @given(cases(models=model_specs(dtypes=st.just(dtype))))
    def check(case: Case) -> None:
        same(bare(case), tapped(case))

    check()


@quick
@given(cases(models=model_specs(clips=clip_present())))
def test_a_clamp_is_seen_alike_as_it_is_done_and_when_it_is_over(case: Case) -> None:
    """Of a subject under test it is caught as it is done: it may be a copy that is clamped."""
    caught = dataclasses.replace(reference(case.model), under_test=True)
    expected, sites = tapped(case), all_sites(case.model)
    actual = observe(caught, case, sites=sites)
    same(expected, actual)
    assert expected.fired == actual.fired
    assert not compare_values(expected, actual, sites, due=expected.fired)
    assert not compare_gradients(expected, actual, sites)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_edits_change_nothing(dtype: str) -> None:
    case = dataclasses.replace(ODD, model=dataclasses.replace(ODD.model, dtype=dtype))
    nothing = [Edit(site=name, kind="identity") for name in all_sites(case.model)]
    same(bare(case), tapped(with_edits(case, *nothing)))


@pytest.mark.parametrize("chunks", [1, 2])
def test_every_site_fires_once_a_forward_in_order(chunks: int) -> None:
    run = dataclasses.replace(ODD.run, use_cache=True, chunks=chunks)
    seen = tapped(dataclasses.replace(ODD, run=run))
    # An attention is given its cos and sin, so they are seen as it is entered; a cache is given
    # the key before the attention function is given the query.
    given = ("attn.hook_cos", "attn.hook_sin", "hook_rot_k")
    names = list(all_sites(ODD.model))
    expected = [*names, *(f"{name}#1" for name in names if chunks == 2)]
    assert sorted(seen.fired) == sorted(expected)
    fired, expected = (
        [name for name in x if not name.split("#")[0].endswith(given)]
        for x in (seen.fired, expected)
    )
    assert fired == expected


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("site", ["attn.hook_q_clipped", "attn.hook_pattern", "mlp.hook_in"])
def test_what_checkpointing_computes_again_is_tapped_too(site: str, reentrant: bool) -> None:
    case = dataclasses.replace(
        ODD,
        model=dataclasses.replace(ODD.model, attention_dropout=0.5),
        run=dataclasses.replace(ODD.run, training=True),
    )
    case = with_edits(case, Edit(site=f"blocks.1.{site}", kind="noise"))
    subject = reference(case.model)
    subject.model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
        {"use_reentrant": reentrant}
    )
    seen = observe(subject, case, sites=all_sites(case.model))
    assert seen.fired.count(f"blocks.1.{site}") == 2
    plain = tapped(case)
    same(plain, seen)
    assert all(torch.equal(value, seen.values[name]) for name, value in plain.values.items())
    assert all(torch.equal(value, seen.gradients[name]) for name, value in plain.gradients.items())


class TestLeavesNoTrace:
    """After a run the model is as it was, whether the run ended well or not."""

    def pristine(self, subject: Subject, attention: str = "eager") -> None:
        for name, module in subject.model.named_modules():
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                assert not getattr(module, kind), (name, kind)
            config = getattr(module, "config", subject.model.config)
            assert config._attn_implementation == attention, name
        for parameter in subject.model.parameters():
            assert not parameter._backward_hooks
        assert not taps._ATTACHED
        assert not _get_current_function_mode_stack()  # type: ignore[no-untyped-call]

    @pytest.mark.parametrize("backward", [True, False])
    def test_after_a_run(self, backward: bool) -> None:
        subject = reference(ODD.model)
        before = {name: value.clone() for name, value in subject.model.state_dict().items()}
        observe(subject, ODD, sites=all_sites(ODD.model), backward=backward)
        self.pristine(subject)
        after = subject.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        same(bare(ODD), observe(subject, ODD))

    def test_other_attention_is_restored(self) -> None:
        subject = reference(ODD.model)
        subject.model.set_attn_implementation("sdpa")
        observe(subject, ODD, sites=all_sites(ODD.model))
        self.pristine(subject, "sdpa")

    @pytest.mark.parametrize("site", list(all_sites(ODD.model))[::9])
    def test_after_an_exception_at_a_site(self, site: str) -> None:
        def visit(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == site:
                raise KeyboardInterrupt
            return tensor

        subject = reference(ODD.model)
        on = Taps(subject.model, all_sites(ODD.model), visit, d_head=4, clamps=True)
        with pytest.raises(KeyboardInterrupt), on.attached():
            subject.model(input_ids=inputs(ODD).tokens)
        self.pristine(subject)
        same(bare(ODD), observe(subject, ODD))
        same(bare(ODD), observe(subject, ODD, sites=all_sites(ODD.model)))

    def test_after_an_exception_while_attaching(self) -> None:
        subject = reference(ODD.model)
        wrong = {"x": dataclasses.replace(all_sites(ODD.model)["embed.hook_in"], module="nowhere")}
        on = Taps(
            subject.model,
            {**all_sites(ODD.model), **wrong},
            lambda name, tensor: tensor,
            d_head=4,
            clamps=True,
        )
        with pytest.raises(AttributeError, match="nowhere"), on.attached():
            pass
        self.pristine(subject)


narrow = partial(run_specs, chunks=st.just(1), trainings=st.just(False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_sites_are_the_clamped_projections(dtype: str) -> None:
    @quick
    @given(cases(models=model_specs(dtypes=st.just(dtype), clips=clip_present()), runs=narrow))
    def check(case: Case) -> None:
        subject = reference(case.model)
        seen = observe(subject, case, sites=all_sites(case.model), backward=False).values
        clip = torch.tensor(case.model.clip_qkv, dtype=getattr(torch, dtype))
        for i in range(case.model.num_hidden_layers):
            for letter in "qkv":
                name = f"blocks.{i}.attn.{letter}"
                projection = getattr(subject.model.model.layers[i].self_attn, f"{letter}_proj")
                with torch.no_grad():
                    projected = F.linear(
                        seen[f"{name}.hook_in"], projection.weight, projection.bias
                    )
                assert torch.equal(seen[f"{name}.hook_out"].flatten(2), projected), name
                clipped = seen[f"blocks.{i}.attn.hook_{letter}_clipped"].flatten(2)
                assert torch.equal(clipped, projected.clamp(-clip, clip)), name
                assert bool((clipped.abs() <= clip).all()), name

    check()


def test_clipped_sites_without_a_clip_are_the_projections() -> None:
    model = ODD.model.without_clip()
    seen = tapped(Case(model=model, run=ODD.run)).values
    for letter in "qkv":
        out, clipped = (
            f"blocks.1.attn.{x}" for x in (f"{letter}.hook_out", f"hook_{letter}_clipped")
        )
        assert torch.equal(seen[out], seen[clipped])


@quick
@given(
    cases(models=model_specs(dtypes=st.just("float32")), runs=partial(run_specs, chunks=st.just(1)))
)
def test_sites_fit_together(case: Case) -> None:
    """What is seen at one site follows from what is seen at others, in train mode too."""
    seen = tapped(case, backward=False).values
    repeats = case.model.num_attention_heads // case.model.num_key_value_heads
    for i in range(case.model.num_hidden_layers):
        block, attn = f"blocks.{i}", f"blocks.{i}.attn"
        pattern, v = seen[f"{attn}.hook_pattern"], seen[f"{attn}.hook_v_clipped"]
        z = pattern @ v.repeat_interleave(repeats, dim=2).transpose(1, 2)
        close(z.transpose(1, 2), seen[f"{attn}.o.hook_in"], "z")
        q, k = seen[f"{attn}.hook_rot_q"], seen[f"{attn}.hook_rot_k"]
        k = k.repeat_interleave(repeats, dim=2)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / case.model.d_head**0.5
        shown = seen[f"{attn}.hook_attn_scores"]
        close(scores[shown > -1e30], shown[shown > -1e30], "scores")
        if not (case.run.training and case.model.attention_dropout):
            close(softmax(shown), pattern, "pattern")
        after = seen[f"{block}.hook_in"] + seen[f"{attn}.hook_out"]
        assert torch.equal(after, seen[f"{block}.ln2.hook_in"])
        after = seen[f"{block}.ln2.hook_in"] + seen[f"{block}.mlp.hook_out"]
        assert torch.equal(after, seen[f"{block}.hook_out"])
    for norm in (name.removesuffix(".hook_scale") for name in seen if name.endswith("hook_scale")):
        x = seen[f"{norm}.hook_in"]
        product = seen[f"{norm}.hook_scale"] * seen[f"{norm}.hook_normalized"]
        close(x - x.mean(-1, keepdim=True), product, norm)


# What `Scratch` knows: float32, silu, the default RoPE, one forward in eval mode, and positions
# that Hugging Face does not take for several texts in a row. Not the narrowest LayerNorms, whose
# gradients are differences of nearly equal numbers.
plain_models = model_specs(
    heads=st.sampled_from(((2, 2), (2, 1), (4, 2), (6, 2), (6, 3))),
    head_dims=st.sampled_from((4, 6, 8)),
    geometries=st.sampled_from(("divided", "stated")),
    activations=st.just("silu"),
    rope_types=st.just("default"),
    dtypes=st.just("float32"),
)
plain_runs = partial(narrow, positions=st.sampled_from(("derived", "offset")))


def agrees_with_scratch(case: Case) -> None:
    """Every site's value and gradient, the logits and the parameters' gradients."""
    seen, scratch = tapped(case), Scratch(case)
    scratch.logits.backward(scratch.data.probe)  # type: ignore[no-untyped-call]
    close(scratch.logits.detach(), seen.logits, "logits")
    assert seen.values.keys() == scratch.values.keys()
    for name, value in scratch.values.items():
        close(value, seen.values[name], name)
    assert seen.gradients.keys() == scratch.gradients.keys()
    for name, gradient in scratch.gradients.items():
        close(gradient, seen.gradients[name], f"gradient of {name}")
    for name, actual in seen.parameter_gradients.items():
        expected = scratch.weights[name].grad
        assert (expected is None) == (actual is None), name
        if expected is not None and actual is not None:
            close(expected, actual, f"gradient of {name}")


@quick
@given(cases(models=plain_models, runs=plain_runs))
def test_agrees_with_scratch(case: Case) -> None:
    agrees_with_scratch(case)


def gentle(site: str) -> tuple[str, ...]:
    """The kinds of edits that a site bears."""
    if site.endswith("hook_scale"):
        return ("scale", "in_place")  # what divides must not be zero
    if site == "unembed.hook_out" or site.endswith("_clipped"):
        # A replaced logit leaves no gradient at all. A replaced clamp is written over the clamped
        # tensor, which then has a gradient of zero and not, as anywhere else, none.
        return tuple(kind for kind in EDITS if kind != "replace")
    return EDITS


edited_runs = lambda model: plain_runs(  # noqa: E731
    model,
    edits=st.tuples(
        st.sampled_from(list(all_sites(model))).flatmap(
            lambda site: edits(sites=st.just(site), kinds=st.sampled_from(gentle(site)))
        )
    ),
)


@settings(quick, max_examples=60)
@given(cases(models=plain_models, runs=edited_runs))
def test_edits_agree_with_scratch(case: Case) -> None:
    agrees_with_scratch(case)


@pytest.mark.parametrize("site", all_sites(ODD.model))
def test_edit_reaches_what_comes_after(site: str) -> None:
    """And nothing that comes before, and it has the effect that it has in plain torch."""
    edit = Edit(site=site, kind="scale")
    case = with_edits(ODD, edit)
    plain, touched = tapped(ODD, backward=False), tapped(case, backward=False)
    names = list(all_sites(ODD.model))
    for name in names[: names.index(site)]:
        assert torch.equal(plain.values[name], touched.values[name]), name
    assert torch.equal(edited(edit, plain.values[site]), touched.values[site])
    later = names[names.index(site) + 1 :]
    moved = [name for name in later if not torch.equal(plain.values[name], touched.values[name])]
    if site == "rotary_emb.hook_in":
        assert not moved  # Hugging Face asks it for nothing but its dtype
    else:
        assert moved or site == "unembed.hook_out"
        assert not torch.equal(plain.logits, touched.logits)
    close(Scratch(case).logits.detach(), touched.logits, "logits")


def test_a_projection_is_seen_before_its_clamp_also_where_the_clamp_is_not_asked_for() -> None:
    asked = observable(ODD.model)
    narrow, wide = observe(reference(ODD.model), ODD, sites=asked), tapped(ODD)
    for name in asked:
        assert torch.equal(narrow.values[name], wide.values[name]), name
    assert narrow.values["blocks.0.attn.q.hook_out"].abs().max() > ODD.model.clip_qkv  # type: ignore[operator]
