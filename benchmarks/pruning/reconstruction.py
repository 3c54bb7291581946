"""ResNet-20 on Fashion-MNIST cut to a share of its FLOPs and not trained: with and without `reconstruct`.

python -m benchmarks.pruning.reconstruction --data FOLDER [--weights FOLDER] [--ratios 2 3 4] [--seeds 0 1 2]

The folders are those of benchmarks.pruning.accuracy. The accuracy is that of the test split, measured once for each
network; nothing was chosen by it. torch-pruning's uniform group magnitude stands beside it when it is installed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rarefy.measure import flops
from rarefy.nouns import implement
from rarefy.recovery.config import BatchNormConfig
from rarefy.tasks.data import fashion_mnist
from rarefy_pruning.channels.config import ChannelL1Config
from torch import nn

from benchmarks.pruning.accuracy import theirs, trained
from benchmarks.runs import Runs

RESULTS = Path(__file__).parent.parent / "results" / "pruning-reconstruction.json"
BATCHES = 16
"""Calibration batches of 64, for the fit and for the statistics."""


def cut(model: nn.Module, task: Any, ratio: float, reconstruct: bool) -> nn.Module:
    """Return the network with 1/ratio of the FLOPs."""
    options: dict[str, Any] = {"target": {"measure": "flops", "share": 1 / ratio}, "round_to": 1}
    technique = implement(ChannelL1Config(reconstruct=reconstruct, reconstruct_batches=BATCHES, **options))
    return technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)


def restated(model: nn.Module, task: Any) -> nn.Module:
    """Estimate the statistics of all batch norms anew, as is common after a cut."""
    technique = implement(BatchNormConfig(batches=BATCHES))
    return technique.transform(model, technique.analyze(model, task), task)


SIDES: dict[str, Callable[[nn.Module, Any, float], nn.Module]] = {
    "cut": lambda model, task, ratio: cut(model, task, ratio, reconstruct=False),
    "cut, batch norms re-estimated": lambda model, task, ratio: restated(
        cut(model, task, ratio, reconstruct=False), task
    ),
    "cut and reconstructed": lambda model, task, ratio: cut(model, task, ratio, reconstruct=True),
    "torch-pruning, uniform": lambda model, task, ratio: theirs(model, task, "uniform", ratio),
}


def measured(model: nn.Module, task: Any, make: Callable[..., nn.Module], ratio: float) -> dict[str, float]:
    """Cut a network and return its accuracy beside the original's, and what is left of the FLOPs."""
    small, inputs = make(model, task, ratio), task.example_inputs(1)
    return {
        "original": task.score(model, "test"),
        "test": task.score(small, "test"),
        "flops_ratio": flops(model, inputs) / flops(small, inputs),
    }


def section(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a section of a page."""
    ratios = list(dict.fromkeys(key.split(" | ")[1] for key in results))
    original = statistics.mean(result["original"] for result in results.values())
    lines = [
        "## Cut and not trained",
        "",
        f"ResNet-20 on Fashion-MNIST, {original:.2%} before; channels cut by `pruning/channel-l1` to a share of the "
        "FLOPs, no training, no labels; accuracy on the test split, mean over the seeds (lowest to highest). "
        f"`reconstruct: true` fits the layers that lost inputs on {BATCHES} batches of 64 images.",
        "",
        f"| | {' | '.join(f'{ratio} fewer FLOPs' for ratio in ratios)} |",
        f"|---|{'---|' * len(ratios)}",
    ]
    for side in SIDES:
        cells = []
        for ratio in ratios:
            found = [r["test"] for key, r in results.items() if key.startswith(f"{side} | {ratio} | ")]
            cells.append(
                f"{statistics.mean(found):.2%} ({min(found):.2%} to {max(found):.2%})" if found else "not measured"
            )
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task, runs = fashion_mnist(chosen.data), Runs(RESULTS)
    for seed in chosen.seeds:
        model = trained(task, "resnet20", seed, chosen.weights)
        for ratio in chosen.ratios:
            for side, make in SIDES.items():
                runs.get(f"{side} | {ratio:g}x | seed {seed}", partial(measured, model, task, make, ratio))


if __name__ == "__main__":
    main()
