"""What metamorphic checks share: relating two runs, how far rounding goes, and changing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from conformance.compare import Gap, compare_tensors
from conformance.inputs import inputs
from conformance.observe import observe, watched
from conformance.recorder import Observation, Recorder
from conformance.sites import Site
from conformance.spec import Case
from conformance.subjects import Subject
from conformance.tolerance import FLOAT32_ULP, exactly, of_rounding

# From a name, ``value`` or ``gradient``, what is due and what came, to what of them must agree.
View = Callable[[str, str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]
WIDE = (torch.float32, torch.float64)  # of the models that `nudged` can run


class _Nudges(Recorder):
    """Moves every value by about one rounding of its row's greatest entry."""

    edits_gradients = True  # and any value, not only those that a run edits

    def __init__(self, seed: int, angles: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.angles = angles

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See `Recorder.edit`."""
        # Masked scores are as large as numbers get: what moves them is moved queries and keys.
        if not tensor.is_floating_point() or name.endswith("hook_attn_scores"):
            return tensor
        by = self.angles if name.endswith(("hook_cos", "hook_sin")) else 1
        # Neighbours go opposite ways, or a LayerNorm of two entries would not notice.
        way = 1 - torch.arange(tensor.shape[-1]) % 2 * 2
        sign = torch.randint(0, 2, (*tensor.shape[:-1], 1), generator=self.draw) * 2 - 1
        greatest = tensor.abs().amax(-1, keepdim=True)
        return tensor + by * FLOAT32_ULP * way * sign * greatest


def underived(sites: Mapping[str, Site]) -> dict[str, Site]:
    """Sites whose tensor Hugging Face computes: relations are stated of these."""
    return {name: site for name, site in sites.items() if not site.derived}


def nudged(
    subject: Subject, case: Case, sites: Mapping[str, Site], *, angles: int = 1
) -> tuple[Observation, ...]:
    """What a float32 or float64 reference shows, four times, with all numbers rounded once more.

    Between it and the plain run lies what rounding can do in this case: little where it cancels,
    much behind a LayerNorm of nearly equal entries. It goes forwards only: a gradient has kinks, at
    the clip and at an activation's, where the least rounding moves it by all it is.

    Args:
        subject: The reference.
        case: What it runs.
        sites: Where numbers are moved, and shown.
        angles: By how many roundings cosines and sines are moved: an angle is rounded in units of
            itself, which grows with the position.
    """
    nudges, d_head = _Nudges(case.run.token_seed, angles), case.model.d_head
    with watched(subject, d_head, sites=sites, backward=False, recorder=nudges) as look:
        return tuple(look(case, inputs(case)) for _ in range(4))


def greatest_move(subject: Subject, case: Case, sites: Mapping[str, Site]) -> float:
    """By how many float32 eps of a tensor's greatest entry roundings move any of a run's tensors.

    See `nudged` for the arguments.
    """
    plain = observe(subject, case, sites=sites, backward=False).values
    runs = nudged(subject, case, sites)

    def move(name: str, tensor: torch.Tensor) -> float:
        by = max(float((tensor - run.values[name]).abs().max()) for run in runs)
        return by / (FLOAT32_ULP * max(float(tensor.abs().max()), tiny))

    tiny = torch.finfo(torch.float32).tiny
    return max(move(name, each) for name, each in plain.items() if each.is_floating_point())


def related_gaps(
    expected: Observation,
    actual: Observation,
    sites: Mapping[str, Site],
    view: View,
    *,
    moved: Sequence[Observation] = (),
    label: str = "",
) -> Iterator[Gap]:
    """Where two runs are not related as they should be: at sites, and in the logits.

    Args:
        expected: The reference's run.
        actual: The bridge's related one.
        sites: The sites related, in order. Derived ones are left out.
        view: What must agree.
        moved: The runs of `nudged`, where the relation holds but for rounding; none is bitwise.
        label: Put before the names of what does not agree.
    """

    def look(
        name: str, kind: str, due: torch.Tensor, got: torch.Tensor | None, by: list[torch.Tensor]
    ) -> Iterator[Gap]:
        if got is None:
            yield Gap(f"{label}{name}", "missing", f"no {kind} of it")
            return
        try:
            seen = view(name, kind, due, got)
        except (RuntimeError, IndexError):
            shapes = f"{list(got.shape)} cannot follow from {list(due.shape)}"
            yield Gap(f"{label}{name}", "shape", shapes)
            return
        if seen is None:
            return
        allowance = exactly(due.dtype)
        if by and due.is_floating_point():
            allowance = of_rounding(due, by)
        gap = compare_tensors(f"{label}{name}", *seen, allowance, kind=kind)
        yield from [gap] if gap else []

    for name in (name for name, site in sites.items() if not site.derived):
        if name in expected.values:
            value, got = expected.values[name], actual.values.get(name)
            yield from look(name, "value", value, got, [run.values[name] for run in moved])
        if name in expected.gradients:
            due, got = expected.gradients[name], actual.gradients.get(name)
            yield from look(name, "gradient", due, got, [])
    by = [run.logits for run in moved]
    yield from look("logits", "value", expected.logits, actual.logits, by)


def reweigh(subject: Subject, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the weights of a model where they lie, as an optimizer would.

    Args:
        subject: The model, bridged or not.
        change: From Hugging Face's name of a parameter and the parameter to what it becomes.
    """
    with torch.no_grad():
        for name, parameter in subject.parameters.items():
            parameter.copy_(change(name, parameter.clone()))
