"""What a compressed model is worth beside its original, outside of any run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rarefy_schemas import Measurement, StageReport

from rarefy.report import numbers
from rarefy.report.sentences import speed_in_words
from rarefy.report.summary import speeds

SHOWN = 0.01
"""Share of zeros from which on they are told; biases often start at zero."""


@dataclass(frozen=True)
class Gain:
    """Figures of a model beside its original; printed, they are one sentence."""

    metric: str
    """Name of the task's metric."""
    before: float
    """The metric of the original on the validation split; NaN without labels."""
    stage: StageReport
    """The figures of the compressed model."""

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Return all figures, with units and quartiles."""
        return self.stage.measurements

    def value(self, name: str) -> float | None:
        """Return one figure, such as `parameters`, `flops_rate` or `speed_up_rate@1`; None when it is not there."""
        return self.stage.value(name)

    def __str__(self) -> str:
        parts = [self._fewer("parameters", "compression_rate"), self._fewer("flops", "flops_rate")]
        sparsity, after = self.value("sparsity"), self.value(self.metric)
        if sparsity and sparsity >= SHOWN:
            parts.insert(1, f"{numbers.percent(sparsity)} of them zero")
        parts += [f"{speed_in_words(speed)} at batch size {speed.batch}" for speed in speeds(self.stage)]
        if after is not None and not math.isnan(after):
            values = [numbers.metric(self.metric, value) for value in (self.before, after)]
            parts.append(f"{self.metric} {' to '.join(values)} on the validation split")
        return ", ".join(filter(None, parts))

    def _fewer(self, name: str, rate_name: str) -> str:
        after, rate = self.value(name), self.value(rate_name)
        if after is None or rate is None:
            return ""
        what = "FLOPs" if name == "flops" else name
        if rate == 1:
            return f"as many {what} ({numbers.short(after)})"
        many = f"{numbers.times(rate)} fewer" if rate > 1 else f"{numbers.times(1 / rate)} more"
        return f"{many} {what} ({numbers.short(rate * after)} to {numbers.short(after)})"
