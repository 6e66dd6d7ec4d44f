"""What a reference showed, kept so that the model itself need not be: digests, and tensors on disk.

A real checkpoint is judged within the memory of one model, so the reference cannot stand beside the
bridge. Each of its tensors is kept as a digest of all its bits, and besides, to say *where* another
one differs, as the tensor itself, in memory if it is small and in a file if it is not. Of the
gradients of the parameters, which together are as large as the model, only a sample is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conformance.compare import Gap, compare_tensors
from conformance.tolerance import Allowance, exactly

SMALL = 2**20  # bytes that are kept in memory
PIECE = 2**22  # entries that are digested, and so copied, at once
SAMPLE = 4096  # entries of what is not kept whole


@dataclass(frozen=True)
class Testimony:
    """What is kept of one tensor.

    Attributes:
        digest: Of its shape, dtype and every bit.
        tensor: It, or None if it is in a file.
        file: The file, or None.
        sampled: Flat indices of the entries that are kept, or None if all are.
        numel: Number of its entries.
    """

    digest: bytes
    tensor: torch.Tensor | None
    file: Path | None
    sampled: torch.Tensor | None
    numel: int

    def kept(self) -> torch.Tensor:
        """The tensor, or the sample."""
        return self.tensor if self.file is None else load_file(self.file)["tensor"]  # type: ignore[return-value]


def digest(tensor: torch.Tensor) -> bytes:
    """A digest of shape, dtype and every bit; zeros of either sign are one."""
    told = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    for piece in tensor.detach().reshape(-1).split(PIECE):  # type: ignore[no-untyped-call]
        whole = piece + 0.0 if piece.is_floating_point() else piece
        told.update(whole.cpu().view(torch.uint8).numpy())
    return told.digest()


class Witness:
    """Remembers a reference's tensors by name.

    Args:
        folder: Where large tensors go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: dict[str, Testimony] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._told

    def names(self) -> list[str]:
        """All names, in the order in which they were kept."""
        return list(self._told)

    def keep(self, name: str, tensor: torch.Tensor, *, whole: bool = True) -> None:
        """Remember a tensor, whole or as a sample."""
        tensor = tensor.detach()
        told, numel, sampled, file = digest(tensor), tensor.numel(), None, None
        if not whole and numel > SAMPLE:
            sampled = torch.linspace(0, numel - 1, SAMPLE, dtype=torch.float64).long()
            tensor = tensor.flatten()[sampled.to(tensor.device)]
        kept: torch.Tensor | None = tensor.cpu().clone(memory_format=torch.contiguous_format)
        assert kept is not None
        if kept.numel() * kept.element_size() > SMALL:
            file = self._folder / f"{len(self._told)}.safetensors"
            save_file({"tensor": kept}, file)
            kept = None
        self._told[name] = Testimony(told, kept, file, sampled, numel)

    def kept(self, name: str) -> torch.Tensor:
        """A tensor that is remembered whole."""
        return self._told[name].kept()

    def difference(self, name: str, tensor: torch.Tensor) -> float:
        """Greatest difference between a tensor and what is remembered of it."""
        told = self._told[name]
        if digest(tensor) == told.digest:
            return 0.0
        there = tensor.detach().cpu()
        if told.sampled is not None:
            there = there.flatten()[told.sampled]
        return float((there.double() - told.kept().double()).abs().max())

    def gap(
        self,
        name: str,
        tensor: torch.Tensor,
        allowance: Callable[[], Allowance | None],
        *,
        kind: str,
        derived: bool,
    ) -> Gap | None:
        """Compare a tensor with what is remembered.

        Args:
            name: Its name.
            tensor: What the subject showed.
            allowance: Says how far an entry may be off; None is not at all. Called only if one is.
            kind: ``value`` or ``gradient``.
            derived: Whether a wider dtype is as good.
        """
        told = self._told[name]
        if digest(tensor) == told.digest:
            return None
        there, expected = tensor.detach().cpu(), told.kept()
        bound = allowance() or exactly(expected.dtype)
        if told.sampled is None:
            return compare_tensors(name, expected, there, bound, kind=kind, any_wider=derived)
        if there.numel() != told.numel:
            return Gap(name, "shape", f"{there.numel()} entries instead of {told.numel}")
        sample = there.flatten()[told.sampled]
        gap = compare_tensors(name, expected, sample, bound, kind=kind)
        if gap is not None or not bound.exact:
            return gap
        kept = f"none of the {SAMPLE} that were kept"
        return Gap(name, kind, f"entries differ, but {kept}, allowed {bound}")
