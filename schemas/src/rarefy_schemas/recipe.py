"""The recipe: what to compress, with what steps, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from rarefy_schemas.base import Json, Noun, Schema
from rarefy_schemas.targets import Targets
from rarefy_schemas.training import Finetune
from rarefy_schemas.traits import DataNeed, Traits


class TechniqueConfig(Noun):
    """Options of a technique; a step of a recipe is one of these."""

    noun: ClassVar[str] = "technique"
    traits: ClassVar[Traits] = Traits()

    name: str | None = Field(default=None, min_length=1)
    """A name for this step in reports; the technique's own when absent."""
    targets: Targets = Targets()
    """Layers to act on."""
    finetune: Finetune | None = None
    """Fine-tuning after the transformation; none when absent."""
    allow_unchanged: bool = False
    """Accept that the step changes nothing; otherwise that is an error."""

    def needed_data(self) -> DataNeed:
        """Return the data that the technique needs with these options."""
        return self.traits.data

    def parts(self) -> Sequence[TechniqueConfig]:
        """Return the steps this one stands for: itself, or several when it is done in rounds."""
        return [self]


class ExporterConfig(Noun):
    """Options of an exporter, one target format of `export`."""

    noun: ClassVar[str] = "format"

    name: str = Field(default="model", pattern=r"^\w[\w.-]*$", max_length=100)
    """Name of the file without its ending, for formats that are written more than once."""


class SourceConfig(Noun):
    """A scheme of references such as `zoo:lenet5`; the `Literal` of `scheme` is its name."""

    noun: ClassVar[str] = "scheme"


def _from_string(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class ModelReference(Schema):
    """Where a model comes from."""

    source: str = Field(min_length=1)
    """`scheme:name` of a registered source, `package.module:callable`, or `./file.py:callable`."""
    options: dict[str, Json] = {}
    """Keyword arguments of the callable."""
    weights: str | None = None
    """A `.safetensors` file, or a `.pt`/`.pth` file that holds only tensors."""


NamedModel = Annotated[ModelReference, BeforeValidator(_from_string, json_schema_input_type=str | ModelReference)]
"""A model reference that may be written as its `source` alone."""


class TaskReference(Schema):
    """Where the data, the loss and the metric come from."""

    source: str = Field(min_length=1)
    """`scheme:name` of a registered source, `package.module:callable`, or `./file.py:callable`."""
    options: dict[str, Json] = {}
    """Keyword arguments of the callable."""


NamedTask = Annotated[TaskReference, BeforeValidator(_from_string, json_schema_input_type=str | TaskReference)]
"""A task reference that may be written as its `source` alone."""


class Evaluate(Schema):
    """What is measured after each step."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 64)
    """Batch sizes at which latency is compared; empty measures none."""
    rounds: int = Field(default=20, ge=3)
    """Interleaved timings of original and compressed model per batch size."""
    threads: int | None = Field(default=None, ge=1)
    """Threads used while timing; torch's current number when absent."""


class Budgets(Schema):
    """What the result must keep to; a missed budget ends the run with exit code 3."""

    accuracy_drop: float | None = Field(default=None, ge=0)
    """Largest loss of the task's metric on the test split, in the metric's unit (0.005 = half a point of accuracy)."""
    bytes: int | None = Field(default=None, gt=0)
    """Largest size of the smallest exported file, in bytes."""
    latency: float | None = Field(default=None, gt=0)
    """Largest latency as a share of the original's (0.5 = twice as fast), at the first measured batch size."""


class Recipe(Schema):
    """A whole run."""

    name: str = Field(default="run", min_length=1)
    """A title for the report."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Everything random comes from this."""
    device: str = "cpu"
    """Torch device that computes."""
    model: NamedModel | None = None
    """The network to compress; absent when the Python API is given one."""
    task: NamedTask | None = None
    """Data, loss and metric; absent when the Python API is given one."""
    train_first: Finetune | None = None
    """Trains the model before anything is compressed, for references that come without weights."""
    steps: tuple[SerializeAsAny[TechniqueConfig], ...] = Field(min_length=1)
    """Techniques in the order in which they are applied."""
    evaluate: Evaluate = Evaluate()
    """How time is measured, after every step."""
    export: tuple[SerializeAsAny[ExporterConfig], ...] = ()
    """Formats to write, by name or with options; the `.rarefy` artifact when empty."""
    budgets: Budgets = Budgets()
    """What the result has to keep to; a run that misses one ends with exit code 3."""

    @field_validator("export")
    @classmethod
    def _files_differ(cls, formats: tuple[ExporterConfig, ...]) -> tuple[ExporterConfig, ...]:
        files = [(entry.registered_name(), entry.name) for entry in formats]
        for i, (format_, name) in enumerate(files):
            if (format_, name) in files[:i]:
                raise ValueError(f"two entries would write the same file, {name!r} as {format_}; give one a `name`")
        return formats


Split = Literal["train", "validation", "test"]
