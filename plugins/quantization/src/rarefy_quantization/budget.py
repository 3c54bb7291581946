"""How many bits the weights of all layers may take together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from rarefy_schemas.base import Schema

GridBits = Annotated[int, Field(ge=2, le=8)]


class BitTarget(Schema):
    """Most bits or bytes of the codes of all layers together; each layer gets those bits that cost the model least.

    Every layer is quantized alone with each of `choices`, and what that does to the model is taken to add up.
    """

    measure: Literal["bits", "bytes"] = "bits"
    """What `most` counts: bits per weight, mean over all weights that are quantized, or bytes. Codes count with their
    bits, as they are before entropy coding, and step sizes do not count."""
    most: float = Field(gt=0)
    """What the codes may take."""
    choices: tuple[GridBits, ...] = Field(default=(2, 3, 4, 8), min_length=1)
    """Bits that a layer may get."""
    by: Literal["outputs", "loss"] = "outputs"
    """What is kept: the outputs on calibration data, by their squared error, or the loss on the validation split, which
    asks for labels and many batches, since it moves by chance, too."""
    batches: int = Field(default=4, ge=1)
    """Batches that this is measured on."""
    tried_by: Literal["technique", "rounding"] = "technique"
    """What quantizes a layer alone: the technique itself, or plain rounding with the same bits, which spares `gptq` and
    `adaround` a calibration per layer and choice."""
