"""The layout of a `.rarefy` file: a head of fixed size, the compressed manifest, then one part per tensor.

    8 bytes   magic
    4 bytes   format version
    8 bytes   length of the compressed manifest
    32 bytes  sha256 of the compressed manifest
    ...       manifest: JSON, compressed by zlib
    ...       parts, in the manifest's order, each with its length and sha256 in the manifest

All numbers are little-endian. There is no date in it: the same model gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError
from rarefy_schemas import ARTIFACT_VERSION, Manifest, TensorEntry

from rarefy.artifact.bits import DTYPES, elements
from rarefy.errors import ArtifactError

MAGIC = b"\x93RAREFY\n"
_HEAD = struct.Struct("<8sIQ32s")
_LARGEST_MANIFEST = 1 << 28
# Coded tensors may be far smaller than decoded ones, but not without end: 1 GiB is free, beyond it this many times
# the file's size (99.9 % zeros code to about 1/2000).
_FREE_BYTES = 1 << 30
_LARGEST_RATIO = 4096
_OTHERS = {
    b"PK\x03\x04": "a zip archive, such as torch.save writes",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x1f\x8b": "a gzip file",
    b"\x08": "perhaps an ONNX model",
}


def head(manifest: Manifest) -> bytes:
    """Return what stands before the parts."""
    text = zlib.compress(manifest.model_dump_json(exclude_defaults=True).encode(), 9)
    return _HEAD.pack(MAGIC, ARTIFACT_VERSION, len(text), hashlib.sha256(text).digest()) + text


class Container:
    """A `.rarefy` file open for reading, its manifest and sizes checked."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self.manifest = self._read_manifest()
        self._check_sizes()

    def parts(self) -> Iterator[tuple[TensorEntry, bytearray]]:
        """Yield each tensor's entry with its bytes, checked against their hash."""
        for entry in self.manifest.tensors:
            part = bytearray(entry.length)
            if self._file.readinto(part) != entry.length:  # type: ignore[attr-defined]
                raise self.error("it changed while it was read")
            if hashlib.sha256(part).hexdigest() != entry.sha256:
                raise self.error(f"tensor {entry.name!r} is damaged (its sha256 differs)")
            yield entry, part

    def error(self, reason: str) -> ArtifactError:
        """Return the error that this file is not sound."""
        return ArtifactError(f"{self._path}: {reason}; copy or download the file again, or export it anew")

    def _read_manifest(self) -> Manifest:
        raw = self._file.read(_HEAD.size)
        if raw[:8] != MAGIC:
            raise ArtifactError(f"{self._path} is not a rarefy artifact: it is {_kind(raw)}; `rarefy run` writes one")
        if len(raw) < _HEAD.size:
            raise self.error(f"it is truncated: it ends after {len(raw)} bytes")
        _, version, length, digest = _HEAD.unpack(raw)
        if version != ARTIFACT_VERSION:
            raise ArtifactError(
                f"{self._path} has format version {version} and this rarefy reads version {ARTIFACT_VERSION}; "
                "`pip install -U rarefy`, or export the model anew"
            )
        if length > min(self._size - _HEAD.size, _LARGEST_MANIFEST):
            raise self.error(f"it is truncated or damaged: its manifest claims {length} bytes")
        compressed = self._file.read(length)
        if hashlib.sha256(compressed).digest() != digest:
            raise self.error("its manifest is damaged (its sha256 differs)")
        self._start = _HEAD.size + length
        return self._parse(compressed)

    def _parse(self, compressed: bytes) -> Manifest:
        inflate = zlib.decompressobj()
        try:
            text = inflate.decompress(compressed, _LARGEST_MANIFEST)
            if not inflate.eof or inflate.unused_data:
                raise self.error("its manifest is too large or incomplete")
            manifest = Manifest.model_validate_json(text)
        except (zlib.error, ValidationError) as error:
            raise self.error(f"its manifest is not sound: {error}") from error
        if manifest.version != ARTIFACT_VERSION:
            raise self.error(f"its manifest claims format version {manifest.version}, not {ARTIFACT_VERSION}")
        return manifest

    def _check_sizes(self) -> None:
        """Compare what the manifest claims with the file's real size before anything is allocated."""
        names = [entry.name for entry in self.manifest.tensors]
        if len(set(names)) != len(names):
            raise self.error("it holds two tensors of one name")
        claimed = self._start + sum(entry.length for entry in self.manifest.tensors)
        if claimed > self._size:
            raise self.error(f"it is truncated: {claimed - self._size} of {claimed} bytes are missing")
        if claimed < self._size:
            raise self.error(f"{self._size - claimed} bytes follow its end")
        decoded = 0
        for entry in self.manifest.tensors:
            size = elements(entry.shape) * DTYPES[entry.dtype].itemsize
            if entry.coding == "raw" and size != entry.length:
                raise self.error(f"tensor {entry.name!r} claims {size} bytes and has {entry.length}")
            decoded += size
        if decoded > max(_FREE_BYTES, _LARGEST_RATIO * self._size):
            raise self.error(f"its tensors claim {decoded} bytes, which a file of {self._size} bytes cannot hold")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Container]:
    """Open an artifact for reading; raise `ArtifactError` when it cannot be read or is not sound."""
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise ArtifactError(f"{path} is a {'folder' if path.is_dir() else 'special file'}; name a .rarefy file")
        file = path.open("rb")
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; check the path and your permissions") from error
    with file:
        yield Container(file, path)


def _kind(raw: bytes) -> str:
    if not raw:
        return "empty"
    if raw[8:9] == b"{":
        return "a safetensors file"
    return next((name for magic, name in _OTHERS.items() if raw.startswith(magic)), "of another format, or damaged")
