"""The report of a run: everything that was measured, in plain data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from rarefy_schemas.base import Schema

REPORT_VERSION = 1


class Measurement(Schema):
    """One measured figure."""

    # a metric such as a perplexity may be infinite
    model_config = ConfigDict(allow_inf_nan=True)

    name: str
    """`accuracy`, `parameters`, `nonzero`, `flops`, `bytes`, `compression_rate`, `speed_up_rate@1`, ..."""
    value: float
    unit: str = ""
    """`share`, `parameters`, `FLOPs`, `bytes`, `ms`, `x` (a ratio), ..."""
    better: Literal["higher", "lower", "neither"] = "neither"
    low: float | None = None
    """Lower quartile, for figures with a spread."""
    high: float | None = None
    """Upper quartile, for figures with a spread."""


class LayerReport(Schema):
    """What was found or done for one layer."""

    name: str
    kind: str
    """Class name of the layer."""
    action: str
    """What is done, in words (`rank 24 of 120`)."""
    scores: dict[str, float] = {}
    """Figures behind the decision, such as `sparsity`, `rank`, `relative_error`, `parameters_after`."""


class SkippedLayer(Schema):
    """A layer left alone."""

    name: str
    kind: str
    reason: str


class Histogram(Schema):
    """Distribution of the weights of one layer."""

    layer: str
    edges: tuple[float, ...]
    """n + 1 bin edges."""
    counts: tuple[int, ...]
    """n counts."""


class StageReport(Schema):
    """The model after one stage: the baseline, or a step."""

    index: int
    """-1 for the baseline."""
    name: str
    technique: str | None = None
    config: dict[str, Any] = {}
    measurements: tuple[Measurement, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    skipped: tuple[SkippedLayer, ...] = ()
    layer_parameters: dict[str, int] = {}
    """Non-zero parameters per layer."""
    histograms: tuple[Histogram, ...] = ()
    training: tuple[dict[str, float], ...] = ()
    """Per epoch: `epoch`, `loss`, `validation`."""
    notes: tuple[str, ...] = ()
    """Findings in words, such as that this step made the model slower."""
    seconds: float = 0.0

    def value(self, name: str) -> float | None:
        """Return the measurement called `name`, or None."""
        return next((m.value for m in self.measurements if m.name == name), None)


class ExportReport(Schema):
    """One exported file."""

    format: str
    path: str
    """Relative to the run folder."""
    bytes: int
    """Read from disk."""
    rate: float
    """Bytes of the original's float32 file divided by `bytes`."""
    max_difference: float
    """Largest absolute difference of outputs between the re-opened file and the model in memory."""
    measurements: tuple[Measurement, ...] = ()
    """Figures of the re-opened file, of formats that lose something: its metric, its time, ..."""
    notes: tuple[str, ...] = ()


class BudgetReport(Schema):
    """One budget of the recipe against what came out."""

    name: str
    limit: float
    value: float
    met: bool


class Report(Schema):
    """A whole run."""

    version: int = REPORT_VERSION
    name: str
    status: Literal["running", "done"]
    metric: str
    """Name of the task's metric."""
    recipe: dict[str, Any]
    seed: int
    baseline: StageReport
    steps: tuple[StageReport, ...] = ()
    test: tuple[Measurement, ...] = ()
    """Metric on the test split, once: `original` and `compressed`, and the `drop`."""
    exports: tuple[ExportReport, ...] = ()
    budgets: tuple[BudgetReport, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    seconds: float = 0.0
