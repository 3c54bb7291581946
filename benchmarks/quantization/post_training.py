"""ResNet-20 on Fashion-MNIST, quantized without training: accuracy against bytes on disk, for every method.

python -m benchmarks.quantization.post_training --data FOLDER [--weights FOLDER] [--seeds 0 1 2]

The folders are those of benchmarks.pruning.accuracy. Every setting that is listed here was run, and nothing was chosen
by its result; the test split is measured once for each network. Results are kept one by one, so that a call goes on
where the last one stopped.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rarefy.artifact import encoded_size
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy.recipe import load_recipe
from rarefy.recovery.config import BatchNormConfig
from rarefy.tasks.data import fashion_mnist
from torch import nn

from benchmarks.pruning.accuracy import trained
from benchmarks.runs import Runs

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
    count = sum(parameter.numel() for parameter in model.parameters())
    found = {"test": task.score(model, "test"), "bytes": size, "bits": 8 * size / count}
    recovery = implement(BatchNormConfig())
    restated = recovery.transform(model, recovery.analyze(model, task), task)
    return {**found, "test_restated": task.score(restated, "test")}


def section(results: dict[str, dict[str, float]]) -> str:
    """Return the results as a section of a page."""
    seeds = sorted({key.rpartition(" | ")[2] for key in results})
    lines = [
        "## Quantized after training",
        "",
        "ResNet-20 on Fashion-MNIST, weights quantized, nothing trained afterwards; mean over the trained networks of "
        f"{len(seeds)} seed(s) (lowest to highest accuracy); every byte of the file counted, BatchNorm in float32 "
        "included. The second accuracy is that after `recovery/batch-norm`, at the same size.",
        "",
        "| method | accuracy on the test split | batch norms measured anew | bytes | smaller | bits per parameter |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[str, list[dict[str, float]]] = {}
    for key, result in results.items():
        found.setdefault(key.rpartition(" | ")[0], []).append(result)
    whole = statistics.mean(r["bytes"] for r in found["float32"])
    for name in ("float32", *SETTINGS):
        if runs := found.get(name):
            size = statistics.mean(r["bytes"] for r in runs)
            scores, restated = ([r[kind] for r in runs] for kind in ("test", "test_restated"))
            lines.append(
                f"| {name} | {_spread(scores)} | {_spread(restated)} | {size:,.0f} | "
                f"{whole / size:.1f}x | {statistics.mean(r['bits'] for r in runs):.2f} |"
            )
    return "\n".join([*lines, ""])


def _spread(scores: list[float]) -> str:
    return f"{statistics.mean(scores):.2%} ({min(scores):.2%} to {max(scores):.2%})"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task, runs = fashion_mnist(chosen.data), Runs(RESULTS)
    for seed in chosen.seeds:
        model = trained(task, "resnet20", seed, chosen.weights)
        for name, setting in ({"float32": None} | SETTINGS).items():
            runs.get(f"{name} | seed {seed}", partial(measured, model, task, setting))


if __name__ == "__main__":
    main()
