"""ResNet-20 on Fashion-MNIST cut to a share of its FLOPs by every criterion: accuracy and time, little or no training.

python -m benchmarks.pruning.criteria --data FOLDER [--weights FOLDER] [--ratios 2 3] [--seeds 0 1 2] [--only NAME ...]

The folders are those of benchmarks.pruning.accuracy. The test split is measured once for each network; nothing was
chosen by it. torch-pruning's group magnitude is measured when it is there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rarefy.measure import flops, latency
from rarefy.nouns import implement
from rarefy.recovery.config import BatchNormConfig
from rarefy.tasks.data import fashion_mnist
from rarefy.training import fit
from rarefy_pruning.channels import config as channels
from torch import nn

from benchmarks.pruning.accuracy import TUNE, theirs, trained
from benchmarks.runs import Runs

RESULTS = Path(__file__).parent.parent / "results" / "pruning-criteria.json"
BATCHES = 16
"""Calibration batches of 64, for the fit and for the statistics."""
EPOCH = TUNE.model_copy(update={"epochs": 1})
CRITERIA: dict[str, tuple[type[channels.ChannelPruning], dict[str, Any]]] = {
    "random": (channels.ChannelRandomConfig, {}),
    "l1": (channels.ChannelL1Config, {}),
    "l2": (channels.ChannelL2Config, {}),
    "l2, like layers together": (channels.ChannelL2Config, {"scope": "alike"}),
    "l2, all layers together": (channels.ChannelL2Config, {"scope": "global"}),
    "geometric median": (channels.ChannelGeometricMedianConfig, {}),
    "batch norm scale": (channels.ChannelBatchNormConfig, {}),
    "mean activation": (channels.ChannelActivationConfig, {}),
    "activations not zero (APoZ)": (channels.ChannelActivationConfig, {"statistic": "nonzero"}),
    "deviation of activations": (channels.ChannelActivationConfig, {"statistic": "deviation"}),
    "taylor": (channels.ChannelTaylorConfig, {}),
    "fisher": (channels.ChannelFisherConfig, {}),
    "fisher, like layers together": (channels.ChannelFisherConfig, {"scope": "alike", "normalize": "mean"}),
    "fisher, all layers together": (channels.ChannelFisherConfig, {"scope": "global", "normalize": "mean"}),
    "fisher, like layers together, per FLOP saved": (channels.ChannelFisherConfig, {"scope": "alike"}),
    "fisher, all layers together, per FLOP saved": (channels.ChannelFisherConfig, {"scope": "global"}),
}
"""Configurations, of which all but those named compare channels within each layer; scores by their layer's mean."""
THEIRS = {"torch-pruning, uniform": "uniform", "torch-pruning, global": "global"}
WAYS = {
    "cut": "cut",
    "restated": "batch norms re-estimated",
    "reconstructed": "reconstructed",
    "tuned": "one epoch, labels",
}


def cut(name: str, reconstruct: bool, model: nn.Module, task: Any, ratio: float) -> nn.Module:
    """Return the network with 1/ratio of the FLOPs."""
    if name in THEIRS:
        return theirs(model, task, THEIRS[name], ratio)
    config, options = CRITERIA[name]
    goal = {"target": {"measure": "flops", "share": 1 / ratio}, "round_to": 1}
    technique = implement(config(reconstruct=reconstruct, reconstruct_batches=BATCHES, **goal, **options))
    return technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)


def measured(name: str, model: nn.Module, original: float, task: Any, ratio: float, seed: int) -> dict[str, Any]:
    """Cut a network and return its accuracies after each way to recover, and its times."""
    small, inputs = cut(name, False, model, task, ratio), task.example_inputs(1)
    found: dict[str, Any] = {
        "original": original,
        "flops_ratio": flops(model, inputs) / flops(small, inputs),
        "cut": task.score(small, "test"),
    }
    technique = implement(BatchNormConfig(batches=BATCHES))
    small = technique.transform(small, technique.analyze(small, task), task)
    found["restated"] = task.score(small, "test")
    if name in CRITERIA:
        found["reconstructed"] = task.score(cut(name, True, model, task, ratio), "test")
    fit(small, model, task, EPOCH, seed=seed)
    found["tuned"] = task.score(small, "test")
    speed = {size: latency(model, small, task.example_inputs(size)) for size in (1, 64)}
    return found | {f"speed_up@{size}": [timed.low, timed.speed_up, timed.high] for size, timed in speed.items()}


def section(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a section of a page, a table per ratio."""
    original = statistics.mean(result["original"] for result in results.values())
    lines = [
        "## Criteria, with little or nothing trained",
        "",
        f"ResNet-20 on Fashion-MNIST, {original:.2%} before; channels cut to a share of the FLOPs; accuracy on the "
        f"test split, mean over the seeds (lowest to highest). `reconstruct: true` fits the layers that lost inputs on "
        f"{BATCHES} batches of 64 images without labels; the epoch is in {EPOCH.precision} and follows the re-"
        "estimated batch norms. Where nothing else is said, each layer loses the same share. Layers that compete do so "
        "by scores relative to their layer's mean, or per FLOP that a channel saves (`normalize: saving`). Speed-ups "
        "are medians of paired timings on one thread, and over the seeds.",
    ]
    for ratio in sorted({key.split(" | ")[1] for key in results}):
        lines += [
            "",
            f"| {ratio} fewer FLOPs | seeds | {' | '.join(WAYS.values())} | faster, batch 1 | batch 64 |",
            f"|---|---|{'---|' * len(WAYS)}---|---|",
        ]
        for name in (*CRITERIA, *THEIRS):
            runs = [run for key, run in sorted(results.items()) if key.startswith(f"{name} | {ratio} | ")]
            if runs:
                cells = [_range([run[way] for run in runs if way in run]) for way in WAYS]
                speeds = [statistics.median(run[f"speed_up@{size}"][1] for run in runs) for size in (1, 64)]
                cells += [f"{speed:.2f}x" for speed in speeds]
                lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _range(found: list[float]) -> str:
    if len(found) < 2:
        return f"{found[0]:.2%}" if found else "-"
    return f"{statistics.mean(found):.2%} ({min(found):.2%} to {max(found):.2%})"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CRITERIA, *(THEIRS if find_spec("torch_pruning") else ())]
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task, runs = fashion_mnist(chosen.data), Runs(RESULTS)
    for seed in chosen.seeds:
        model = trained(task, "resnet20", seed, chosen.weights)
        original = task.score(model, "test")
        for ratio in chosen.ratios:
            for name in chosen.only:
                make = partial(measured, name, model, original, task, ratio, seed)
                runs.get(f"{name} | {ratio:g}x | seed {seed}", make)


if __name__ == "__main__":
    main()
