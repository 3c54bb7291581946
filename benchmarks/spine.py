"""What the quickstart recipe gives over several seeds, and how near the artifact's coder comes to the entropy.

python -m benchmarks.spine    measures and writes results/spine.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "spine.json"
SEEDS = (0, 1, 2)


def quickstart(seed: int) -> dict[str, Any]:
    """Run the shipped recipe with a seed and return sizes, accuracy and times."""
    from rarefy.pipeline import run
    from rarefy.recipe import load_recipe

    recipe = load_recipe("quickstart", [f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        report = run(recipe, Path(folder) / "run").report
        seconds = time.monotonic() - began
    export = next(export for export in report.exports if export.format == "rarefy")
    original, compressed, drop = (measurement.value for measurement in report.test)
    last = report.steps[-1]
    return {
        "seed": seed,
        "bytes": export.bytes,
        "rate": export.rate,
        "original": original,
        "compressed": compressed,
        "drop": drop,
        "speed_up_1": last.value("speed_up_rate@1"),
        "speed_up_64": last.value("speed_up_rate@64"),
        "seconds": seconds,
        "environment": report.environment,
    }


def coder(kept: float, levels: int, size: int = 1_000_000) -> dict[str, float]:
    """Code `size` Gaussian weights, pruned to a share and rounded to an even grid, and compare with other coders."""
    import lzma
    import zlib

    from rarefy.artifact import codebook

    values = np.random.default_rng(0).normal(size=size).astype(np.float32)
    values[np.abs(values) < np.quantile(np.abs(values), 1 - kept)] = 0
    step = 2 * np.abs(values).max() / levels
    values = (np.round(values / step) * step + 0.0).astype(np.float32)  # -0.0 would be a symbol of its own
    codes, counts = np.unique(values, return_counts=True)
    entropy = float((counts * np.log2(size / counts)).sum()) / size
    bits = values.view(np.uint32)
    encode, decode = [], []
    for _ in range(5):
        began = time.perf_counter()
        part = codebook.encode(bits)
        between = time.perf_counter()
        assert part is not None
        back = codebook.decode(part, 4, size)
        decode.append(time.perf_counter() - between)
        encode.append(between - began)
        assert np.array_equal(back, bits)
    narrow = np.searchsorted(codes, values).astype(np.uint8).tobytes()
    return {
        "kept": kept,
        "levels": levels,
        "entropy": entropy,
        "coded": 8 * len(part) / size,
        "xz": 8 * len(lzma.compress(narrow, preset=9)) / size,
        "zlib": 8 * len(zlib.compress(narrow, 9)) / size,
        "encode_per_second": size / statistics.median(encode),
        "decode_per_second": size / statistics.median(decode),
    }


def section(results: dict[str, Any]) -> str:
    """Return the results as sections of the page."""
    runs, coders = results["quickstart"], results["coder"]
    environment = runs[0]["environment"]
    lines = [
        "## The quickstart recipe",
        "",
        "LeNet-5 (431,080 parameters, 1.72 MB as float32) on 5,000 MNIST digits. Sizes are bytes on disk, everything "
        "counted. Accuracy is that of the last epoch on the 1,000 held-back digits, measured once; one digit is "
        "0.1 point.",
        "",
        "| seed | bytes | smaller | accuracy before | after | drop | speed-up at batch 1 | at batch 64 | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['seed']} | {r['bytes']:,} | {r['rate']:.1f}x | {r['original']:.1%} | {r['compressed']:.1%} | "
        f"{100 * r['drop']:+.1f} points | {r['speed_up_1']:.2f}x | {r['speed_up_64']:.2f}x | {r['seconds']:.0f} |"
        for r in runs
    ]
    drops = [100 * r["drop"] for r in runs]
    lines += [
        "",
        f"Mean drop {statistics.mean(drops):.2f} points, spread {min(drops):+.1f} to {max(drops):+.1f}. The network is "
        "not faster: zeros and shared values take part in dense products like any other value.",
        "",
        "## The artifact's coder",
        "",
        "A million Gaussian weights, the smallest pruned, the others on an even grid; bits per weight, codebook and "
        "histogram included. The entropy is that of independent symbols, which no coder without context can beat. "
        "zlib and xz are given one byte per code and no codebook.",
        "",
        "| kept | levels | entropy | rarefy | xz | zlib | encode | decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['kept']:.0%} | {c['levels']} | {c['entropy']:.4f} | {c['coded']:.4f} | {c['xz']:.4f} | "
        f"{c['zlib']:.4f} | {c['encode_per_second'] / 1e6:.0f} M/s | {c['decode_per_second'] / 1e6:.0f} M/s |"
        for c in coders
    ]
    lines += [
        "",
        f"Measured on {environment['processor']}, {environment['threads']} threads, torch {environment['torch']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the results."""
    coders = [
        coder(kept, levels) for kept, levels in ((1.0, 16), (1.0, 32), (0.2, 32), (0.1, 32), (0.05, 32), (1.0, 3))
    ]
    results = {"quickstart": [quickstart(seed) for seed in SEEDS], "coder": coders}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
