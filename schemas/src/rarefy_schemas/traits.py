"""What a technique needs and does, as capabilities; the order of a recipe is judged by these alone."""

from __future__ import annotations

from typing import Literal

from rarefy_schemas.base import Schema

DataNeed = Literal["none", "unlabelled", "labelled", "teacher"]


class Traits(Schema):
    """Capabilities of a technique."""

    data: DataNeed = "none"
    """Data the technique itself needs with its default options, fine-tuning aside."""
    start: Literal["pretrained", "scratch", "either"] = "pretrained"
    """Whether it starts from trained weights."""
    layers: tuple[str, ...] = ("Linear", "Conv1d", "Conv2d", "Conv3d")
    """Class names of the layers it acts on; `*` is every layer with tensors of its own. Classes that a library derived
    from them count too where only weights matter: no data is looked at, and layers stay in place."""
    changes_shapes: bool = False
    """Layers are replaced or their widths change."""
    makes_zeros: bool = False
    """Leaves zeros that later steps must keep to be worth anything."""
    keeps_zeros: bool = True
    """Weights that are zero on entry are zero on exit."""
    needs_dense_floats: bool = False
    """Needs weights that may take any real value: it cannot follow a step that left codes."""
    leaves_codes: bool = False
    """Leaves weights that take few values (a codebook); moving them afterwards would undo it."""
    ends_training: bool = False
    """Nothing can be fine-tuned afterwards."""
    may_grow: bool = False
    """May increase the number of parameters."""
    new_architecture: bool = False
    """Returns another network (a student) instead of a changed copy."""
