"""torch's own integer kernels: how much faster three linear layers are on them, by width and batch size.

python -m benchmarks.quantization.torch_kernels [--widths N ...] [--batches N ...]

The network has random weights, as only time and the error of rounding are asked for; its hidden width, inputs and
outputs are equally wide. All is timed on one thread, in turn with the same network in float32, by the time that the
process had a core: on a busy machine longer passes are always interrupted and shorter ones are not, so that times by
the clock gave up to 38x.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rarefy.measure.latency import MOST_REPEATS, SHORT, using_threads
from rarefy.measure.mode import evaluation
from rarefy_quantization.execution.torch_int8 import integer_kernels
from torch import nn

from benchmarks.runs import Runs

RESULTS = Path(__file__).parent.parent / "results" / "quantization-torch-kernels.json"
WIDTHS, BATCHES = (64, 256, 1024, 2048), (1, 16, 128)
ROUNDS = 50


def core_times(models: Sequence[nn.Module], inputs: tuple[Any, ...], rounds: int, threads: int | None) -> list[float]:
    """Return the shortest seconds on a core of a forward pass of each model, timed in turn `rounds` times each."""
    with evaluation(*models), using_threads(threads), torch.inference_mode():
        repeats = [min(MOST_REPEATS, max(1, round(SHORT / _seconds(model, inputs, 3)))) for model in models]
        turns = [[_seconds(*each) for each in zip(models, [inputs] * 2, repeats, strict=True)] for _ in range(rounds)]
    return [min(each) for each in zip(*turns, strict=True)]


def _seconds(model: nn.Module, inputs: tuple[Any, ...], repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        model(*inputs)
    return max((time.process_time() - began) / repeats, 1e-9)


def measured(width: int, batch: int) -> dict[str, Any]:
    """Return the time of the layers and of the network on integers beside float32, and the error of its outputs."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(3)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    _, report = integer_kernels(model, (torch.randn(batch, width),), rounds=ROUNDS, measure=core_times)
    return {
        "layers": [layer.speed_up for layer in report.layers],
        "replaced": sum(layer.replaced for layer in report.layers),
        "faster": report.speed_up,
        "error": report.error,
        "on integers": report.replaced,
        "engine": str(torch.backends.quantized.engine),
        "torch": torch.__version__,
    }


def section(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a section of a page."""
    first = next(iter(results.values()))
    lines = [
        "## torch's integer kernels",
        "",
        "Three linear layers with ReLU between them, as many inputs and outputs as hidden units, random weights, in "
        f"torch {first['torch']} with the engine `{first['engine']}` on one thread. A layer runs on integers where it "
        "is at least a twentieth faster than in float32, the network where it is as a whole. Times are the "
        f"shortest of {ROUNDS} in either form, taken in turn in one process, and counted while it had a core, as the "
        "machine was shared and busy; the error is the root of the mean squared difference of the outputs, as a share "
        "of their standard deviation.",
        "",
        "| width | batch | layers faster | layers on integers | network faster | error | returned |",
        "|---" * 7 + "|",
    ]
    for name, run in sorted(results.items(), key=lambda item: [int(part) for part in item[0].split("x")]):
        width, batch = name.split("x")
        speed, error = ("", "") if run["faster"] is None else (f"{run['faster']:.2f}x", f"{run['error']:.2%}")
        layers = ", ".join(f"{speed_up:.2f}x" for speed_up in run["layers"])
        lines.append(
            f"| {width} | {batch} | {layers} | {run['replaced']} of 3 | {speed} | "
            f"{error} | {'integers' if run['on integers'] else 'float32'} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(RESULTS)
    for width in chosen.widths:
        for batch in chosen.batches:
            runs.get(f"{width}x{batch}", partial(measured, width, batch))


if __name__ == "__main__":
    main()
