"""The manifest of a `.rarefy` artifact."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rarefy_schemas.base import Schema
from rarefy_schemas.recipe import ModelReference

ARTIFACT_VERSION = 2

Coding = Literal["raw", "planes", "codebook", "steps", "trellis", "vectors", "huffman"]
Coder = Literal["range", "huffman"]
Size = Annotated[int, Field(ge=0, le=2**48)]


class ModuleSpec(Schema):
    """How to construct one submodule."""

    kind: str
    """Registered class, such as `torch.nn.Conv2d`."""
    arguments: dict[str, Any] = {}
    """Plain constructor arguments."""
    children: dict[str, ModuleSpec] = {}
    """Children of a container, by name, in order."""
    distribution: str | None = None
    """`name==version` of the package that provides the class; None for torch."""


class ModelSpec(Schema):
    """An architecture as a difference to a base."""

    base: ModelReference | None = None
    """Reference that builds the skeleton; None when the base is the caller's own code or `root` is complete."""
    root: ModuleSpec | None = None
    """The whole network, when it is made of registered classes only."""
    modules: dict[str, ModuleSpec] = {}
    """Submodules that differ from the skeleton, by name."""
    attributes: dict[str, dict[str, Any]] = {}
    """Plain-data attributes that differ, by module name."""
    ties: dict[str, str] = {}
    """Parameters that are the same tensor as another: name -> first name."""


class TensorEntry(Schema):
    """One tensor and the part of the file that holds it."""

    name: str
    dtype: Literal["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    shape: tuple[Size, ...]
    coding: Coding
    """`raw`: little-endian values; `planes`: the first bytes of all values, then the second, each range-coded;
    `codebook`: distinct values once, then range-coded codes; `steps`: a step for each row, group or the whole, then
    range-coded multiples; `trellis`: one step, then range-coded indices of a path through a trellis; `vectors`:
    distinct vectors of consecutive values once, then range-coded ranks; `huffman`: distinct values once, then Huffman
    codes of them and of the distances between them."""
    length: Size
    """Bytes of its part."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Schema):
    """Everything about an artifact but its tensors."""

    version: int
    creator: str
    """`rarefy X.Y.Z`."""
    spec: ModelSpec
    tensors: tuple[TensorEntry, ...]
    """In the order of their parts."""
