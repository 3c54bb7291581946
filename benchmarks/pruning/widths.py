"""What it pays to round the widths of pruned layers up to a multiple, on this machine.

python -m benchmarks.pruning.widths [--threads N] [--output FILE]

Layers of every width `k` from `W - 15` to `W` channels, in and out, are timed in turn, so that what else the machine
does falls on all alike. Rounding up to `m` gives `ceil(k / m) * m` channels: more work, and less time where the
kernels prefer multiples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results" / "widths.json"
WIDTHS = (16, 32, 64, 128, 256, 512)
MULTIPLES = (1, 2, 4, 8, 16)
MOST_REMOVED = 15
ROUNDS = 15
SHORTEST = 0.001
"""Seconds that one timing should last at least."""


def layers() -> dict[str, Callable[[int], tuple[Any, Any]]]:
    """Return builders of a layer of a width and its input, by name."""
    import torch
    from torch import nn

    def conv(side: int, batch: int) -> Callable[[int], tuple[Any, Any]]:
        return lambda k: (nn.Conv2d(k, k, 3, padding=1), torch.randn(batch, k, side, side))

    def linear(rows: int) -> Callable[[int], tuple[Any, Any]]:
        return lambda k: (nn.Linear(k, k), torch.randn(rows, k))

    return {
        "conv 3x3, 16x16, batch 1": conv(16, 1),
        "conv 3x3, 16x16, batch 16": conv(16, 16),
        "linear, 1 row": linear(1),
        "linear, 64 rows": linear(64),
    }


def times(build: Callable[[int], tuple[Any, Any]], width: int) -> dict[int, float]:
    """Return the time of each width beside that of the full one, median over rounds of one timing each."""
    import torch

    made = {k: build(k) for k in range(max(1, width - MOST_REMOVED), width + 1)}

    def once(k: int, repeats: int) -> float:
        layer, x = made[k]
        began = time.perf_counter()
        for _ in range(repeats):
            layer(x)
        return (time.perf_counter() - began) / repeats

    with torch.inference_mode():
        for k in made:
            once(k, 2)
        repeats = max(1, math.ceil(SHORTEST / min(once(width, 3) for _ in range(3))))
        rounds = []
        for turn in range(ROUNDS):
            order = sorted(made, reverse=bool(turn % 2))
            rounds.append({k: once(k, repeats) for k in order})
    return {k: statistics.median(each[k] / each[width] for each in rounds) for k in made}


def gains(relative: dict[int, float]) -> dict[int, float]:
    """Return, by multiple, the time after rounding up beside that without, median over the widths in between."""
    found = {}
    for multiple in MULTIPLES:
        pairs = [(math.ceil(k / multiple) * multiple, k) for k in relative]
        found[multiple] = statistics.median(relative[up] / relative[k] for up, k in pairs if up in relative)
    return found


def summary(rows: list[dict[str, Any]], narrowest: int, widest: int) -> dict[int, float]:
    """Return the gains by multiple over the layers of some widths, geometric mean."""
    chosen = [row["rounded"] for row in rows if narrowest <= row["width"] <= widest]
    return {m: statistics.geometric_mean([gain[str(m)] for gain in chosen]) for m in MULTIPLES}


def section(results: dict[str, Any]) -> str:
    """Return the results in words and a table."""
    rows, machine = results["rows"], results["environment"]
    ranges = [(width, width) for width in WIDTHS] + [(16, 64), (128, 512)]
    lines = [
        "## Widths",
        "",
        "Time of a layer whose width was rounded up to a multiple, beside that of the layer as it was; below 1 the "
        f"wider layer is the faster one. Layers have up to {MOST_REMOVED} channels less than the width in the first "
        "column, in and out; geometric mean over 3x3 convolutions on 16x16 pixels (batch 1 and 16) and linear layers "
        f"(1 and 64 rows), medians of {ROUNDS} rounds in turn.",
        "",
        f"| width | {' | '.join(f'multiple of {m}' for m in MULTIPLES[1:])} |",
        f"|{'---|' * len(MULTIPLES)}",
    ]
    for narrowest, widest in ranges:
        gain = summary(rows, narrowest, widest)
        name = str(widest) if narrowest == widest else f"{narrowest} to {widest}"
        lines.append(f"| {name} | {' | '.join(f'{gain[m]:.3f}' for m in MULTIPLES[1:])} |")
    threads = "1 thread" if machine["threads"] == "1" else f"{machine['threads']} threads"
    return "\n".join([*lines, "", f"Measured on {machine['processor']}, {threads}, torch {machine['torch']}.", ""])


def main() -> None:
    """Measure and write the results."""
    import torch
    from rarefy.environment import environment
    from rarefy.registry import get

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for name, build in layers().items():
        for width in WIDTHS:
            relative = times(build, width)
            rows.append({"layer": name, "width": width, "relative": relative, "rounded": gains(relative)})
            print(name, width, {m: round(gain, 3) for m, gain in gains(relative).items()}, flush=True)
    kept = ("processor", "torch", "threads")
    machine = {key: value for key, value in environment(get()).items() if key in kept}
    given.output.write_text(json.dumps({"rows": rows, "environment": machine}, indent=2) + "\n")
    print(section(json.loads(given.output.read_text())))


if __name__ == "__main__":
    main()
