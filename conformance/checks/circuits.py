"""What is multiplied out of the weights: QK and OV circuits, and composition scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens import FactoredMatrix

from conformance.checks.registry import Adapter, check
from conformance.checks.relations import WIDE
from conformance.checks.weights import shaped_cases
from conformance.compare import Gap, compare_tensors, within
from conformance.parts import stacked, weights
from conformance.spec import Case
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged
from conformance.tolerance import of_composition, of_eigenvalues, of_product


def _by_query_head(subject: Subject, case: Case) -> dict[str, torch.Tensor]:
    """Hugging Face's weights of attention in float64, ``[layer, head, ...]``.

    Query head h reads key-value head h // group, which is repeated for it.
    """
    model = case.model
    wide = {name: each.detach().double() for name, each in subject.parameters.items()}
    found = stacked(weights(wide, model), model)
    group = model.num_attention_heads // model.num_key_value_heads
    read = [head // group for head in range(model.num_attention_heads)]
    shared = {name: found[name][:, read] for name in ("W_K", "W_V")}
    return {"W_Q": found["W_Q"], "W_O": found["W_O"], **shared}


def _decomposes(dtype: torch.dtype) -> bool:
    """Whether this release has singular values of a dtype: known defect composition-short-dtype."""
    one = torch.ones((1, 1), dtype=dtype)
    try:
        FactoredMatrix(one, one).svd()
    except NotImplementedError:
        return False
    return True


def _eigenvalue_gaps(
    name: str, left: torch.Tensor, right: torch.Tensor, got: torch.Tensor, dtype: torch.dtype
) -> Iterator[Gap]:
    """The gaps of a circuit's eigenvalues, as many as a head has entries.

    They have no order, so that sums of their powers are compared: traces of the inner products.
    """
    inner = right @ left
    size = torch.linalg.matrix_norm(right.abs() @ left.abs())
    if got.shape != inner.shape[:-1] or not got.is_complex():
        told = f"{got.dtype} {list(got.shape)} instead of {list(inner.shape[:-1])}"
        yield Gap(f"{name}.eigenvalues", "shape", told)
    elif dtype in WIDE:
        for power in (1, 2):
            trace = torch.linalg.matrix_power(inner, power).diagonal(dim1=-2, dim2=-1).sum(-1)
            total = torch.view_as_real(got.to(torch.complex128).pow(power).sum(-1))
            due, scale = torch.view_as_real(trace.to(torch.complex128)), size[..., None] ** power
            label = f"{name}.eigenvalues, the sum of powers of {power}"
            yield from within(of_eigenvalues(dtype), label, due / scale, total / scale)


@check(
    "circuits.products",
    "The QK and OV circuits are the dense products of Hugging Face's weights, head by head, also "
    "where heads share keys and values, and have their eigenvalues.",
    shaped_cases,
    examples=0.3,
)
def products(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Multiplied out for all heads and for the last one alone, by either way to get them."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    part = _by_query_head(subject, case)
    factors = {"QK": (part["W_Q"], part["W_K"].mT), "OV": (part["W_V"], part["W_O"])}
    dtype = getattr(torch, case.model.dtype)
    layers = list(range(case.model.num_hidden_layers))
    for name, (left, right) in factors.items():
        other = f"{name}_for_attn_layers"
        with at_work(f"multiplying out {name}"):
            indices, circuit = getattr(bridge, other)()
            found = {
                name: getattr(bridge, name).AB.detach(),
                f"{name}[-1, -1]": getattr(bridge, name)[-1, -1].AB.detach(),
                f"{other}()": circuit.AB.detach(),
            }
        if list(indices) != layers:
            yield Gap(f"{other}()", "contract", f"says that the layers are {indices}")
        if _decomposes(dtype):
            with at_work(f"the eigenvalues of {name}"):
                values = getattr(bridge, name).eigenvalues.detach()
            yield from _eigenvalue_gaps(name, left, right, values, dtype)
        due = (left @ right).to(dtype)
        for label, got in found.items():
            allowance = of_product(left, right, dtype)
            wanted = due[-1, -1] if label.endswith("]") else due
            gap = compare_tensors(label, wanted, got, allowance)
            yield from [gap] if gap else []


def layered_cases() -> SearchStrategy[Case]:
    """Cases with layers to compose. Shrinks towards two."""
    return cases(models=model_specs(layers=st.sampled_from((2, 2, 3))))


def _norm(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.square().sum((-2, -1)).sqrt()


def _scores(output: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """``|output @ reader| / |output| / |reader|`` for each pair of heads, the later layer's last.

    Args:
        output: What heads write of what they read, ``[layer, head, d_model, d_model]``.
        reader: What heads read it with, laid out alike.
    """
    pairs = output[:, :, None, None] @ reader[None, None]
    scores = _norm(pairs) / _norm(output)[:, :, None, None] / _norm(reader)[None, None]
    layers = torch.arange(len(output))
    later = layers[:, None, None, None] < layers[None, None, :, None]
    return torch.where(later, scores, 0.0)


@check(
    "circuits.composition",
    "Composition scores are those of the dense circuits of Hugging Face's weights, for queries, "
    "keys and values, and zero where one layer does not follow the other.",
    layered_cases,
    examples=0.2,
)
def composition(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """With their labels; an unknown mode is refused."""
    model = case.model
    subject = bridged(model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    part = _by_query_head(subject, case)
    output, attends = part["W_V"] @ part["W_O"], part["W_Q"] @ part["W_K"].mT
    readers = {"Q": attends, "K": attends.mT, "V": output}
    if not _decomposes(getattr(torch, model.dtype)):
        readers = {}  # known defect composition-short-dtype
    layers, heads = range(model.num_hidden_layers), range(model.num_attention_heads)
    labels = [f"L{layer}H{head}" for layer in layers for head in heads]
    dtype = torch.promote_types(getattr(torch, model.dtype), torch.float32)
    for mode, reader in readers.items():
        name = f"all_composition_scores({mode!r})"
        with at_work(name):
            got = bridge.all_composition_scores(mode)
            scores, said, indices = got.scores.detach(), got.head_labels, got.layer_indices
        due = _scores(output, reader).to(dtype)
        gap = compare_tensors(name, due, scores, of_composition(dtype))
        yield from [gap] if gap else []
        if bool(scores[due == 0].any()):
            yield Gap(name, "value", "a score of a layer with one that does not follow it")
        if said != labels or list(indices) != list(layers):
            yield Gap(name, "contract", f"labels are {said}, layers {indices}")
    try:
        bridge.all_composition_scores("X")
    except ValueError:
        return
    except Exception as error:
        yield Gap("all_composition_scores('X')", "contract", f"{type(error).__name__}: {error}")
    else:
        yield Gap("all_composition_scores('X')", "contract", "is not refused")
