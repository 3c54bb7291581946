"""Layers changed one after the other: one forward pass per calibration batch for all of them, or one per layer.

python -m benchmarks.passes [--batches N] [--rounds N]

GPTQ at 4 bits on networks of the zoo with random weights and inputs, both ways in turn in one process; the weights that
come out are compared bit by bit. `rarefy.passes` says when passes cannot go together, and every layer has its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results" / "passes.json"
NETWORKS = ("resnet20", "resnet56", "vit_tiny")
SAMPLES, SHAPE = 32, (3, 32, 32)
"""Inputs of a batch, and the shape of one."""


def measure(name: str, batches: int, rounds: int) -> dict[str, Any]:
    """Return seconds of both ways, round by round."""
    import torch
    from rarefy import zoo
    from rarefy.nouns import implement
    from rarefy.passes import Passes
    from rarefy.testing.subjects import Inputs
    from rarefy_quantization.config import GPTQConfig

    torch.manual_seed(0)
    model: Any = getattr(zoo, name)().eval()
    task: Any = Inputs(*(torch.randn(SAMPLES, *SHAPE) for _ in range(batches)))
    technique = implement(GPTQConfig(bits=4, batches=batches))
    analysis = technique.analyze(model, task)

    def once(together: bool) -> tuple[float, Any]:
        changed = copy.deepcopy(model)
        with nullcontext() if together else mock.patch.object(Passes, "_called_once", return_value=[]):
            began = time.perf_counter()
            technique.transform(changed, analysis, task)
            return time.perf_counter() - began, changed.state_dict()

    once(together=True)
    seconds: dict[str, list[float]] = {"together": [], "apart": []}
    same = True
    for _ in range(rounds):
        states = []
        for way, times in seconds.items():
            took, state = once(way == "together")
            times.append(took)
            states.append(state)
        same = same and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    return {"layers": len(analysis.layers), "batches": batches, "seconds": seconds, "same": same}


def section(results: dict[str, Any]) -> str:
    """Return the results in words and a table."""
    machine = results["environment"]
    lines = [
        "## Layers changed one after the other",
        "",
        f"GPTQ at 4 bits, batches of {SAMPLES} random inputs, random weights: one forward pass per batch that serves "
        "all layers in turn, beside one per layer and batch. Seconds are medians of rounds in turn, ratios have their "
        "range. What comes out is compared bit by bit.",
        "",
        "| network | layers | batches | passes together | passes apart | faster | same weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results["networks"].items():
        together, apart = run["seconds"]["together"], run["seconds"]["apart"]
        ratios = sorted(slow / fast for fast, slow in zip(together, apart, strict=True))
        medians = " | ".join(f"{statistics.median(times):.1f} s" for times in (together, apart))
        faster = f"{statistics.median(ratios):.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        same = "yes" if run["same"] else "no"
        lines.append(f"| {name} | {run['layers']} | {run['batches']} | {medians} | {faster} | {same} |")
    return "\n".join([*lines, "", f"Measured on {machine['processor']}, 1 thread, torch {machine['torch']}.", ""])


def main() -> None:
    """Measure and write the results."""
    import torch
    from rarefy.environment import environment
    from rarefy.registry import get

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in NETWORKS:
        found[name] = measure(name, given.batches, given.rounds)
        print(f"{name}: {found[name]}", flush=True)
    machine = {key: value for key, value in environment(get()).items() if key in ("processor", "torch")}
    RESULTS.write_text(json.dumps({"environment": machine, "networks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
