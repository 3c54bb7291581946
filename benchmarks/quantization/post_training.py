"""Trained networks, weights quantized without training: score against bytes on disk, for every method.

python -m benchmarks.quantization.post_training --data FOLDER [--weights FOLDER] [--networks NAME ...] [--seeds 0 1 2]

The folders are those of benchmarks.pruning.accuracy, the networks those of benchmarks.quantization.execution. ResNet-20
is trained with every seed and quantized by every method; the others come trained, and show how far the bits can fall.
Every setting that is listed here was run; the one choice, damping of .1 among .01, .1 and 1, was made by the squared
error of EfficientNet-Lite0's outputs on its validation crops. The test split is measured once for each network that is
made. Results are kept one by one, so that a call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rarefy.artifact import encoded_size
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy.recipe import load_recipe
from rarefy.recovery.config import BatchNormConfig
from torch import nn

from benchmarks.quantization.execution import NETWORKS
from benchmarks.runs import Runs, spread

RESULTS = Path(__file__).parent.parent / "results" / "quantization-post-training.json"
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"uniform, {r}, {b} bits": {"technique": "uniform", "range": r, "bits": b} for b in (8, 4, 3) for r in
       ("min-max", "percentile", "mse", "entropy")},
    **{f"gptq, {r}, {b} bits": {"technique": "gptq", "range": r, "bits": b} for b in (8, 4, 3, 2) for r in
       ("min-max", "mse")},
    **{f"adaround, {r}, {b} bits": {"technique": "adaround", "range": r, "bits": b} for b in (4, 3, 2) for r in
       ("min-max", "mse")},
    **{f"adaround as published, {b} bits": {"technique": "adaround", "settle": False, "bits": b} for b in (4, 3, 2)},
    **{f"{technique}, {most} bits on average": {"technique": technique, "target": {"most": most}}
       for technique, most in (("uniform", 4), ("uniform", 3), ("gptq", 2.5))},
    **{f"trellis, {rate} bits": {"technique": "trellis", "rate": rate} for rate in (4, 3, 2, 1.5)},
    **{f"kmeans, {b} bits": {"technique": "kmeans", "bits": b} for b in (4, 3, 2)},
    **{f"vector, {codes} of {length}": {"technique": "vector", "codes": codes, "length": length} for codes, length in
       ((256, 4), (256, 9), (16, 4))},
    **{f"residual, {stages} x {codes} of {length}": {"technique": "residual", "stages": stages, "codes": codes,
       "length": length} for stages, codes, length in ((2, 64, 4), (3, 64, 4), (2, 256, 9))},
    **{f"q-cnn, {codes} of {length}, one codebook": {"technique": "q-cnn", "codes": codes, "length": length,
       "blocks": 1} for codes, length in ((256, 9), (16, 4))},
    **{f"entropy-constrained, {rate} bits": {"technique": "entropy-constrained", "rate": rate} for rate in (3, 2, 1.5)},
    **{
        f"entropy-constrained by curvature, {rate} bits": {
            "technique": "entropy-constrained", "rate": rate, "importance": "curvature",
        }
        for rate in (3, 2, 1.5)
    },
}  # fmt: skip
CURVE: dict[str, dict[str, Any]] = {
    **{f"uniform, {b} bits": {"technique": "uniform", "bits": b} for b in (8, 6, 5, 4, 3)},
    **{f"gptq, {b} bits": {"technique": "gptq", "batches": 4, "bits": b} for b in (8, 6, 5, 4, 3)},
    **{f"gptq, {most} bits on average, damping .1": {"technique": "gptq", "batches": 4, "damping": 0.1, "target": {
       "most": most, "choices": [2, 3, 4, 5, 6, 8], "batches": 1, "tried_by": "rounding"}} for most in (6, 5, 4, 3)},
}  # fmt: skip
"""Settings of the networks that come trained."""


def quantized(model: nn.Module, task: Any, setting: dict[str, Any]) -> nn.Module:
    """Return the network after one technique of the family, with its other options left alone."""
    step = {**setting, "technique": f"quantization/{setting['technique']}"}
    technique = implement(load_recipe({"steps": [step]}).steps[0])
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    return technique.consolidate(changed)


def measured(original: nn.Module, task: Any, setting: dict[str, Any] | None) -> dict[str, float]:
    """Return accuracy, bytes of the artifact, and bits of it per parameter."""
    model = original if setting is None else quantized(original, task, setting)
    size = encoded_size(model, as_base(original))
    model = copy.deepcopy(model)
    count = sum(parameter.numel() for parameter in original.parameters())
    found = {"test": task.score(model, "test"), "bytes": size, "bits": 8 * size / count}
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        for name, relative in (("test_restated", False), ("test_relative", True)):
            recovery = implement(BatchNormConfig(relative=relative))
            recovery.original = original
            analysis = recovery.analyze(model, task)
            found[name] = task.score(recovery.transform(copy.deepcopy(model), analysis, task), "test")
    return found


def section(results: dict[str, dict[str, float]]) -> str:
    """Return the results as a section of a page."""
    lines = [
        "## Quantized after training",
        "",
        "Weights quantized, nothing trained afterwards; every byte of the file counted, batch norms in float32 "
        "included. The second and third score are those after `recovery/batch-norm`, at the same size: with the "
        "statistics of the calibration data, and with what has changed in them since the original network "
        "(`relative`). The score of ResNet-20 is accuracy on Fashion-MNIST, mean over trained networks (lowest to "
        "highest); those of the others are as under *Files on integer kernels*.",
        "",
        "| network | method | networks | score on the test split | batch norms measured anew | relative to the "
        "original | bytes | smaller | bits per parameter |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for key, result in results.items():
        network, name, _ = key.split(" | ")
        found.setdefault(network, {}).setdefault(name, []).append(result)
    for network in NETWORKS:
        for name in ("float32", *dict.fromkeys([*SETTINGS, *CURVE])):
            if runs := found.get(network, {}).get(name):
                lines.append(f"| {network} | {name} | {_cells(runs, found[network]['float32'])} |")
    return "\n".join([*lines, ""])


def _cells(runs: list[dict[str, float]], whole: list[dict[str, float]]) -> str:
    size, all_of_it = (statistics.mean(run["bytes"] for run in some) for some in (runs, whole))
    scores = [[100 * run[name] for run in runs if name in run] for name in ("test", "test_restated", "test_relative")]
    cells = [str(len(runs)), *(spread(some) if some else "-" for some in scores), f"{size:,.0f}"]
    return " | ".join([*cells, f"{all_of_it / size:.1f}x", f"{statistics.mean(run['bits'] for run in runs):.2f}"])


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20"])
    parser.add_argument("--settings", default="*", help="shell pattern of those to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trained ResNet-20")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(RESULTS)
    for network in chosen.networks:
        for seed in chosen.seeds if network == "resnet20" else [0]:
            model, task = NETWORKS[network][0](argparse.Namespace(**{**vars(chosen), "seed": seed}))
            for name, setting in ({"float32": None} | (SETTINGS if network == "resnet20" else CURVE)).items():
                if fnmatch(name, chosen.settings):
                    runs.get(f"{network} | {name} | seed {seed}", partial(measured, model, task, setting))


if __name__ == "__main__":
    main()
