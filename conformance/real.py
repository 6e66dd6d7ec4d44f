"""Judge a real checkpoint: first the reference runs, then the same weights, patched and bridged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import OlmoForCausalLM

from conformance.checks.registry import Adapter
from conformance.checks.support import has_exact
from conformance.compare import Gap, compare_firing
from conformance.inputs import PROBE_SCALE
from conformance.points import canonical_points
from conformance.sites import Site, observable_in
from conformance.subjects import at_work, make_adapter
from conformance.taps import Taps
from conformance.tolerance import Allowance, of_gradient, of_value
from conformance.witness import Witness

LOGITS = "logits"
Watch = Callable[[str, str, torch.Tensor], None]  # value or gradient, a name, a tensor
OnLayer = Callable[[str, int], None]


@dataclass
class Report:
    """What was found so far: an interrupted run leaves a report that says how far it came.

    Attributes:
        judged: Tensors compared, by subject.
        gaps: Disagreements, by subject, in the order in which they were found.
        complete: Subjects that were judged to the end.
        measured: Names of tensors that the reference itself does not give twice, with by how much.
    """

    judged: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, list[Gap]] = field(default_factory=dict)
    complete: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)


class _Kept(Mapping[str, torch.Tensor]):
    """The tensors of a witness as the allowances ask for them."""

    def __init__(self, witness: Witness, kind: str, names: Collection[str]) -> None:
        self._witness, self._kind, self._names = witness, kind, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._witness.kept(f"{self._kind} {name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Judged:
    """A loaded checkpoint and how it is run.

    Attributes:
        model: The Hugging Face model, which is bridged in the end.
        tokens: ``[1, pos]``.
        layers: Layers whose parameters' gradients are judged.
        gradients: Whether there is a backward at all.
        on_layer: Called with the name of a subject and the number of layers it has run.
    """

    model: OlmoForCausalLM
    tokens: torch.Tensor
    layers: tuple[int, ...]
    gradients: bool
    on_layer: OnLayer

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are judged, by Hugging Face's names."""
        if not self.gradients:
            return {}
        named = dict(self.model.named_parameters())
        if len(self.layers) == self.model.config.num_hidden_layers:
            return named
        prefixes = tuple(f"model.layers.{layer}." for layer in self.layers)
        return {name: value for name, value in named.items() if name.startswith(prefixes)}


@contextmanager
def _graph(judged: Judged, parameters: Mapping[str, nn.Parameter], watch: Watch) -> Iterator[None]:
    """A graph from the embedding on; each parameter's gradient is shown and forgotten at once."""

    def shown(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        watch("parameter", name, parameter.grad)
        parameter.grad = None

    def rooted(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if output.requires_grad else output.requires_grad_()

    with ExitStack() as stack:
        if judged.gradients:
            embedding = judged.model.get_input_embeddings()
            raw = getattr(embedding, "original_component", embedding)
            stack.callback(raw.register_forward_hook(rooted).remove)
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            shows = partial(shown, name)
            hook = parameter.register_post_accumulate_grad_hook(shows)  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        stack.enter_context(torch.set_grad_enabled(judged.gradients))
        yield


def _backward(judged: Judged, logits: torch.Tensor) -> None:
    if judged.gradients:
        draw = torch.Generator().manual_seed(0)
        probe = PROBE_SCALE * torch.randn(logits.shape, generator=draw)
        logits.backward(probe.to(logits.device, logits.dtype))  # type: ignore[no-untyped-call]


def _run_tapped(
    judged: Judged, name: str, sites: Mapping[str, Site], *, clamps: bool, watch: Watch
) -> None:
    """Run a Hugging Face model with taps on it."""
    config = judged.model.config
    d_head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)

    def see(site: str, source: torch.Tensor, turn: Any, value: torch.Tensor | None) -> None:
        watch("value", site, turn(source.detach()) if value is None else value)
        _tell_layer(judged, name, site)
        if source.requires_grad:
            source.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: watch("gradient", site, turn(gradient))
            )

    taps = Taps(judged.model, sites, lambda _, x: x, d_head=d_head, clamps=clamps, see=see)
    with _graph(judged, judged.trained(), watch), taps.attached():
        logits = judged.model(judged.tokens, use_cache=False).logits
        watch("value", LOGITS, logits)
        _backward(judged, logits)


def _tell_layer(judged: Judged, name: str, site: str) -> None:
    block, _, hook = site.removeprefix("blocks.").partition(".")
    if hook == "hook_out" and block.isdigit():
        judged.on_layer(name, int(block) + 1)


def _run_bridged(
    judged: Judged,
    bridge: TransformerBridge,
    parameters: Mapping[str, nn.Parameter],
    gradients_at: Collection[str],
    watch: Watch,
) -> list[str]:
    """Run a bridge with hooks on it: the names of the hooks that fired."""
    fired: list[str] = []
    points = canonical_points(bridge)

    def forward(tensor: torch.Tensor, hook: Any, site: str) -> None:
        fired.append(site)
        watch("value", site, tensor)
        _tell_layer(judged, "bridged", site)

    def backward(tensor: torch.Tensor, hook: Any, site: str) -> None:
        watch("gradient", site, tensor)

    try:
        for site, point in points.items():
            point.add_hook(partial(forward, site=site))
            if judged.gradients and site in gradients_at:
                point.add_hook(partial(backward, site=site), dir="bwd")
        with _graph(judged, parameters, watch):
            logits = bridge(judged.tokens, return_type="logits", use_cache=False)
            watch("value", LOGITS, logits)
            _backward(judged, logits)
    finally:
        for point in points.values():
            point.remove_hooks("both")
    return fired


class _Comparison:
    """Compares a subject's tensors with the witness' as they come."""

    def __init__(
        self, name: str, witness: Witness, sites: Mapping[str, Site], report: Report
    ) -> None:
        self._name, self._witness, self._sites, self._report = name, witness, sites, report
        self._seen: set[str] = set()
        report.judged[name], report.gaps[name] = 0, []

    def finish(self, *, unless: Callable[[str, str], bool] = lambda kind, name: False) -> None:
        """Say what never came, but for what nobody asked for."""
        for key in self._witness.names():
            kind, _, name = key.partition(" ")
            if key not in self._seen and not unless(kind, name):
                self._report.gaps[self._name].append(Gap(name, "missing", f"{kind}: never came"))
        self._report.complete.append(self._name)

    def __call__(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        key = f"{kind} {name}"
        self._seen.add(key)
        self._report.judged[self._name] += 1
        gaps = self._report.gaps[self._name]
        if key not in self._witness:
            known = name in self._sites or kind == "parameter" or name == LOGITS
            what = "the reference has none there" if known else "no site of the table"
            gaps.append(Gap(name, "extra", f"{kind}: {what}"))
            return
        site = self._sites.get(name)
        gap = self._witness.gap(
            key,
            tensor,
            lambda: self._allowance(kind, name, site, tensor),
            kind="value" if kind == "value" else "gradient",
            derived=site is not None and bool(site.derived),
        )
        if gap is not None:
            gaps.append(Gap(name, gap.kind, gap.detail, gap.greatest, gap.index))

    def _allowance(
        self, kind: str, name: str, site: Site | None, tensor: torch.Tensor
    ) -> Allowance | None:
        measured = self._report.measured.get(f"{kind} {name}")
        if measured:
            return Allowance(0.0, 2 * measured, "measured: twice what two references differ by")
        if site is None or not site.derived:
            return None
        values = _Kept(self._witness, "value", self._sites)
        if kind == "value":
            return of_value(site, name, values)
        return of_gradient(site, values, _Kept(self._witness, "gradient", self._sites))


def judge_model(
    model: OlmoForCausalLM,
    adapter: Adapter,
    tokens: torch.Tensor,
    folder: Path,
    *,
    gradients: str = "slice",
    report: Report | None = None,
    on_layer: OnLayer = lambda subject, layers: None,
) -> Report:
    """Run a model as the reference, then judge it patched and bridged. It ends bridged.

    Args:
        model: A pristine model, in eval mode, whose parameters need no gradient.
        adapter: The adapter under test.
        tokens: The input, ``[1, pos]``.
        folder: Where the reference's tensors are kept meanwhile.
        gradients: ``none``; ``slice``, of all sites and of the parameters of the first, middle and
            last layer; or ``all``.
        report: What to fill in, so that it is there if the run is interrupted.
        on_layer: Called with a subject's name and the number of layers that it has run.

    Raises:
        SubjectError: If the adapter or its bridge breaks.
    """
    report = report if report is not None else Report()
    count = model.config.num_hidden_layers
    layers = range(count) if gradients == "all" else sorted({0, count // 2, count - 1})
    judged = Judged(model, tokens.to(model.device), tuple(layers), gradients != "none", on_layer)
    declared = tuple(getattr(adapter, "optional_hooks", ()))
    sites = observable_in(count, declared)
    clamps = model.config.clip_qkv is not None
    witness = Witness(folder)

    def keep(kind: str, name: str, tensor: torch.Tensor) -> None:
        witness.keep(f"{kind} {name}", tensor, whole=kind != "parameter")

    def measure(kind: str, name: str, tensor: torch.Tensor) -> None:
        difference = witness.difference(f"{kind} {name}", tensor)
        if difference:
            report.measured[f"{kind} {name}"] = difference

    _run_tapped(judged, "reference", sites, clamps=clamps, watch=keep)
    if model.device.type != "cpu":  # its kernels may not be deterministic
        _run_tapped(judged, "reference again", sites, clamps=clamps, watch=measure)

    parameters = judged.trained()
    made = make_adapter(adapter, model)
    if clamps and has_exact(adapter):
        with at_work("a model patched with exact_clip=True"):
            made.prepare_model(model, exact_clip=True)  # type: ignore[call-arg]
            compared = _Comparison("patched", witness, sites, report)
            _run_tapped(judged, "patched", sites, clamps=True, watch=compared)
        compared.finish()
    with at_work("building the bridge"):
        made.prepare_model(model)
        bridge = TransformerBridge(model, made, None)
        if bridge.training:  # else it is left alone: eval() would hide a component in another mode
            bridge.eval()
    derived = {name for name, site in sites.items() if site.derived}
    compared = _Comparison("bridged", witness, sites, report)
    with at_work("running the bridge"):
        fired = _run_bridged(judged, bridge, parameters, sites.keys() - derived, compared)
    report.gaps["bridged"] += [gap for gap in compare_firing(sites, fired) if gap.kind != "missing"]
    compared.finish(unless=lambda kind, name: kind == "gradient" and name in derived)
    return report
