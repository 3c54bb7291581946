"""What a file that loses something is worth beside the model and beside the float32 file."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from rarefy.errors import StageError
from rarefy.exporters.onnx import OnnxModel
from rarefy.measure import latency
from rarefy.task import Task
from rarefy_schemas import Measurement
from torch import nn
from torch.utils._pytree import tree_structure

from rarefy_quantization.execution.comparison import Comparison, floats, in_words
from rarefy_quantization.execution.config import QuantizedOnnxFormat

BATCHES = 16
"""Most batches of the validation split on which outputs are compared; the metric takes all of it."""


@dataclass
class Verdict:
    """Measures the file of a model.

    Rounding changes every output a little, so there is no tolerance per output. Instead the error is held against what
    the outputs have to say, the spread of their values over the data, in one figure that needs neither labels nor
    knowledge of the metric: at 1 a file knows no more of the model than the mean of its outputs.
    """

    config: QuantizedOnnxFormat
    model: nn.Module
    task: Task
    notes: list[str] = field(default_factory=list)

    @torch.no_grad()
    def error(self, file: OnnxModel) -> list[Measurement]:
        """Return the error of the outputs, and how often their largest is the same where the metric is accuracy.

        Raises `StageError` when the error exceeds the option `max_error`.
        """
        comparison = Comparison()
        for batch in itertools.islice(self.task.loader("validation"), BATCHES):
            inputs = self.task.inputs(batch)
            comparison.add(floats(self.model(*inputs)), floats(file(*inputs)))
        error = comparison.error()
        if not error <= self.config.max_error:
            raise StageError(
                f"the error of the outputs of the {self.config.registered_name()} file is {error:.0%} of their spread "
                f"on the validation split, and `max_error` is {self.config.max_error:.0%}; exclude the layers that "
                "suffer, calibrate in another way, or allow more"
            )
        found = [Measurement(name="output_error", value=error, unit="share", better="lower")]
        agreement = comparison.agreement()
        if self.task.metric == "accuracy" and agreement is not None:
            found.append(Measurement(name="agreement", value=agreement, unit="share", better="higher"))
        return found

    def scores(self, file: OnnxModel) -> list[Measurement]:
        """Return the task's metric of file and model on the validation split; nothing where it has none."""
        inputs = self.task.example_inputs(self.config.batch_size)
        with torch.no_grad():
            file.structure = tree_structure(self.model(*inputs))
        ours, theirs = (self.task.score(model, "validation") for model in (file, self.model))
        if math.isnan(theirs):
            return []
        self.notes.append(f"{self.task.metric} on the validation split: {ours:.6g}, the model's {theirs:.6g}")
        better = "higher" if self.task.higher_is_better else "lower"
        named = ((self.task.metric, ours), (f"{self.task.metric} of the model", theirs))
        return [Measurement(name=name, value=value, better=better) for name, value in named]

    def cost(self, file: OnnxModel, size: int, float32: bytes) -> list[Measurement]:
        """Return bytes and time beside the float32 file, timed in turn in this process."""
        inputs = self.task.example_inputs(self.config.batch_size)
        timed = latency(OnnxModel(float32), file, inputs, self.config.rounds)
        rate = len(float32) / size
        self.notes.append(
            f"{rate:.2f}x {'smaller' if rate > 1 else 'of the bytes, so not smaller,'} and {in_words(timed)} than the "
            f"float32 ONNX file, at batch {self.config.batch_size} on {torch.get_num_threads()} thread(s)"
        )
        speed = Measurement(
            name=f"speed_up_rate@{self.config.batch_size}",
            value=timed.speed_up, unit="x", better="higher", low=timed.low, high=timed.high,
        )  # fmt: skip
        return [Measurement(name="float32_rate", value=rate, unit="x", better="higher"), speed]
