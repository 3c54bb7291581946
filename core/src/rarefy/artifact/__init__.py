"""The compressed model as one file: written, measured, inspected and loaded, never unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rarefy_schemas import ARTIFACT_VERSION, Coder, Coding, Manifest, ModelSpec, TensorEntry
from torch import nn

from rarefy import __version__
from rarefy.artifact import paths, relative, steps, symbols, vectors
from rarefy.artifact.bits import DTYPES, Bits, elements, from_bits, name_of, row_width, stored, to_bits
from rarefy.artifact.container import Container, head, opened
from rarefy.artifact.filling import fill, tensors_of
from rarefy.artifact.memory import Encoded, Memory
from rarefy.errors import ArtifactError
from rarefy.files import atomic_write
from rarefy.modules import Base, build, describe
from rarefy.modules.difference import is_own_code

__all__ = ["TensorRow", "assemble", "encoded_size", "inspect", "load", "read_manifest", "write"]

_MEMORY = Memory(most=2**26)


@dataclass(frozen=True)
class TensorRow:
    """How one tensor is stored."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    coding: str
    bytes: int
    bits_per_element: float


def write(model: nn.Module, base: Base, path: str | Path, coder: Coder = "range") -> None:
    """Write `model` as one file, whole or not at all.

    `coder: huffman` codes as Deep Compression did, for comparison (see `rarefy.artifact.relative`).

    Raises `ArtifactError` when the model cannot be described (see `rarefy.modules.describe`), `StageError` when the
    system refuses to write.
    """
    start, parts = _encoded(model, base, coder)
    with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(start)
        for part in parts:
            file.write(part)


def encoded_size(model: nn.Module, base: Base) -> int:
    """Return the number of bytes that `write` would write."""
    start, parts = _encoded(model, base)
    return len(start) + sum(len(part) for part in parts)


def load(
    path: str | Path,
    base: Base | nn.Module | Callable[[], nn.Module] | None = None,
    map_location: str | torch.device = "cpu",
) -> nn.Module:
    """Return the model of a file, in evaluation mode.

    `base` is the original network or a function that builds it; it is needed when that is the user's own code, which
    loading a file never runs by itself. Raises `ArtifactError` when the file is not sound or does not fit the base.
    """
    with opened(Path(path)) as container:
        tensors = {entry.name: _decoded(container, entry, part) for entry, part in container.parts()}
        return assemble(container.manifest.spec, tensors, base, map_location)


def assemble(
    spec: ModelSpec,
    tensors: dict[str, torch.Tensor],
    base: Base | nn.Module | Callable[[], nn.Module] | None,
    map_location: str | torch.device = "cpu",
) -> nn.Module:
    """Build the network of a spec and give it its tensors."""
    model = build(spec, base if base is not None or spec.root is not None else _referred(spec))
    fill(model, {name: tensor.to(map_location) for name, tensor in tensors.items()}, spec.ties)
    return model.eval()


def read_manifest(path: str | Path) -> Manifest:
    """Return the manifest of a file, its own hash and all sizes checked."""
    with opened(Path(path)) as container:
        return container.manifest


def inspect(path: str | Path) -> list[TensorRow]:
    """Return how each tensor of a file is stored."""
    return [
        TensorRow(
            tensor=entry.name,
            shape=entry.shape,
            dtype=entry.dtype,
            coding=entry.coding,
            bytes=entry.length,
            bits_per_element=8 * entry.length / max(1, elements(entry.shape)),
        )
        for entry in read_manifest(path).tensors
    ]


def _encoded(model: nn.Module, base: Base, coder: Coder = "range") -> tuple[bytes, list[memoryview]]:
    spec = describe(model, base)
    entries, parts = [], []
    for name, tensor in tensors_of(model).items():
        dtype = name_of(tensor, name)
        bits = to_bits(tensor)
        coding, part = _smallest(bits, dtype, tuple(tensor.shape), coder)
        entries.append(
            TensorEntry(
                name=name,
                dtype=dtype,
                shape=tuple(tensor.shape),
                coding=coding,
                length=len(part),
                sha256=hashlib.sha256(part).hexdigest(),
            )
        )
        parts.append(part)
    manifest = Manifest(version=ARTIFACT_VERSION, creator=f"rarefy {__version__}", spec=spec, tensors=tuple(entries))
    return head(manifest), parts


def _smallest(bits: Bits, dtype: str, shape: tuple[int, ...], coder: Coder) -> tuple[Coding, memoryview]:
    """Return the coding that takes the fewest bytes, and these."""
    plain = memoryview(bits.view(np.uint8))  # type: ignore[arg-type]
    key = (hashlib.sha256(plain).digest(), dtype, shape, coder)
    found = _MEMORY.get(key)
    if found is None:
        found = _tried(bits, dtype, shape, coder)
        _MEMORY.put(key, found)
    return found[0], plain if found[0] == "raw" else memoryview(found[1])


def _tried(bits: Bits, dtype: str, shape: tuple[int, ...], coder: Coder) -> Encoded:
    """Return the coding that takes the fewest bytes, the simpler one of equals, and these, but none for plain ones."""
    coded: dict[Coding, bytes | None]
    if coder == "huffman":
        coded = {"huffman": relative.encode(bits)}
    else:
        section = symbols.section(bits, row_width(shape))
        coded = {
            "planes" if section[0] == symbols.PLANES else "codebook": section,
            "steps": steps.encode(bits, dtype, shape),
            "trellis": paths.encode(bits, dtype, shape),
        }
        least = min(len(part) for part in coded.values() if part is not None)
        coded["vectors"] = vectors.encode(bits, shape, least)
    smallest = min(((c, part) for c, part in coded.items() if part is not None), key=lambda p: len(p[1]), default=None)
    return smallest if smallest is not None and len(smallest[1]) < bits.nbytes else ("raw", b"")


def _decoded(container: Container, entry: TensorEntry, part: bytearray) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    try:
        return from_bits(_bits(entry, part, dtype.itemsize), dtype, entry.shape)
    except (ArtifactError, RuntimeError, ValueError) as error:
        raise container.error(f"tensor {entry.name!r} cannot be decoded: {error}") from error


def _bits(entry: TensorEntry, part: bytearray, itemsize: int) -> Bits:
    if entry.coding in ("codebook", "planes"):
        return symbols.read_section(part, itemsize, elements(entry.shape), row_width(entry.shape))
    if entry.coding == "steps":
        return steps.decode(part, entry.dtype, entry.shape)
    if entry.coding == "vectors":
        return vectors.decode(part, itemsize, entry.shape)
    if entry.coding == "trellis":
        return paths.decode(part, entry.dtype, entry.shape)
    if entry.coding == "huffman":
        return relative.decode(part, itemsize, elements(entry.shape))
    return np.frombuffer(part, stored(itemsize))


def _referred(spec: ModelSpec) -> Base | None:
    """Return the base that a spec refers to; None when it refers to none."""
    if spec.base is None:
        return None
    if is_own_code(spec.base):
        raise ArtifactError(
            f"the file was made from {spec.base.source!r}, which is somebody's own code, and loading a file runs no "
            "code; give it yourself: rarefy.load(path, base=build_function)"
        )
    from rarefy.references import build_model

    reference = spec.base
    return Base(lambda: build_model(reference, trusted=False))
