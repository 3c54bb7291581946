"""Options of preparations."""

from __future__ import annotations

from typing import ClassVar, Literal

from rarefy_schemas import TechniqueConfig, Traits


class LinearLayersConfig(TechniqueConfig):
    """Put `torch.nn.Linear` in the place of layers that compute the same under another class, as GPT-2's `Conv1D` does.

    Techniques know layers by their class, and pass over such a layer. Put this step first. Whether a layer is linear is
    found by trying it on random inputs; no class is known by name. Outputs change by no more than rounding.
    """

    traits: ClassVar[Traits] = Traits(layers=("*",), changes_shapes=True)
    implementation: ClassVar[str] = "rarefy.preparation.linear:LinearLayers"
    paper: ClassVar[str] = "unpublished"

    technique: Literal["prepare/linear"] = "prepare/linear"
