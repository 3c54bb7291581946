"""LeNet-5 with weights of one or two bits, trained through the quantizer: test errors beside the float network's.

python -m benchmarks.quantization.low_bit --data FOLDER [--task mnist] [--seeds 0 1 2] [--weights FOLDER]

The folder is that of benchmarks.quantization.deep_compression. Every weight of every layer is quantized, the first and
the last layer included; biases are not. All settings are listed here, and nothing was chosen by its result; the last
epoch counts, and the test split is measured once for each network. Results are kept one by one.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import rarefy
import torch
from rarefy import zoo
from rarefy.tasks import data
from rarefy.training import fit
from rarefy_schemas import Finetune
from torch import nn

from benchmarks.runs import Runs, spread, trained_once

RESULTS = Path(__file__).parent.parent / "results" / "quantization-low-bit.json"
TASKS = {"mnist": data.mnist, "fashion-mnist": data.fashion_mnist}
TRAIN = Finetune(epochs=12, lr=0.001, weight_decay=0.0001, batch_size=128, memory_format="channels_last")
TUNE: dict[str, Any] = {"epochs": 12, "lr": 0.001, "batch_size": 128, "memory_format": "channels_last"}
METHODS: dict[str, dict[str, Any]] = {
    "binary, BWN": {"technique": "quantization/binary", "method": "bwn", "keep_ends": False},
    "2 bits, learned steps": {"technique": "quantization/uniform", "bits": 2, "range": "mse"},
    "binary, loss-aware": {"technique": "quantization/binary", "method": "loss-aware", "keep_ends": False},
    "ternary, TWN": {"technique": "quantization/ternary", "method": "twn", "keep_ends": False},
    "ternary, TTQ": {
        "technique": "quantization/ternary",
        "method": "ttq",
        "keep_ends": False,
        "finetune": {**TUNE, "lr": 0.01},
    },
}


def original(given: argparse.Namespace, task: Any, seed: int) -> nn.Module:
    """Return LeNet-5 trained with a seed, from the folder when it is there."""
    torch.manual_seed(seed)
    model = zoo.lenet5()
    file = given.weights and given.weights / f"{given.task}-lenet5-{seed}.safetensors"
    return trained_once(model, file, lambda: fit(model, model, task, TRAIN, seed=seed))


def measured(model: nn.Module, task: Any, method: dict[str, Any], seed: int) -> dict[str, Any]:
    """Quantize by one method with training; return errors, and the bytes of the file."""
    recipe = {"seed": seed, "steps": [{"finetune": TUNE, **method}], "export": [{"format": "rarefy"}]}
    report = rarefy.compress(model, recipe, task).report
    export = report.exports[0]
    return {
        "error_before": 1 - report.test[0].value,
        "error_after": 1 - report.test[1].value,
        "bytes": export.bytes,
        "rate": export.rate,
        "seconds": report.seconds,
    }


def section(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a section of the page."""
    lines = [
        "## One and two bits",
        "",
        f"LeNet-5, all weights quantized, {TUNE['epochs']} epochs of training through the quantizer from the float "
        "network, last epoch; 10,000 test images, mean (and range) over seeds.",
        "",
        "| task | weights | seeds | float error | error | change | bytes | smaller |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for method in METHODS:
            runs = [run for key, run in sorted(results.items()) if key.startswith(f"{task} | {method} |")]
            if runs:
                before, after = ([100 * run[f"error_{when}"] for run in runs] for when in ("before", "after"))
                size, rate = (statistics.mean(run[figure] for run in runs) for figure in ("bytes", "rate"))
                change = statistics.mean(after) - statistics.mean(before)
                cells = [task, method, str(len(runs)), spread(before), spread(after), f"{change:+.2f} points"]
                lines.append(f"| {' | '.join(cells)} | {size:,.0f} | {rate:.1f}x |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the task's IDX files")
    parser.add_argument("--task", choices=TASKS, default="mnist")
    parser.add_argument("--weights", type=Path, help="folder for the trained originals")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    task, runs = TASKS[given.task](given.data), Runs(RESULTS)
    for seed in given.seeds:
        model = original(given, task, seed)
        for name, method in METHODS.items():
            runs.get(f"{given.task} | {name} | seed {seed}", partial(measured, model, task, method, seed))


if __name__ == "__main__":
    main()
