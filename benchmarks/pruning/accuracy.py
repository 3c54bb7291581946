"""ResNet-20 on Fashion-MNIST at 2x and 3x fewer FLOPs: our criteria against torch-pruning's, same fine-tuning.

python -m benchmarks.pruning.accuracy --data FOLDER [--weights FOLDER] [--ratios 2 3] [--seeds 0 1 2]

FOLDER of `--data` holds the four IDX files of Fashion-MNIST (Debian: package dataset-fashion-mnist, in
/usr/share/datasets/fashion-mnist). `--weights` keeps the trained networks between calls. torch-pruning is measured
when it is there: `pip install --no-deps torch-pruning==1.6.1`, beside rarefy.

Which criterion and which loss stands for each side is chosen on the validation split at seed 0; the test split is
measured once per run, after the last epoch. Results are kept run by run in results/pruning-accuracy.json, so that a
call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rarefy import zoo
from rarefy.measure import flops, latency, parameters
from rarefy.nouns import implement
from rarefy.tasks.data import fashion_mnist
from rarefy.training import fit
from rarefy_distillation.config import LogitsConfig
from rarefy_pruning.channels import config as channels
from rarefy_schemas import Finetune
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.runs import Runs

RESULTS = Path(__file__).parent.parent / "results" / "pruning-accuracy.json"
TRAIN = Finetune(epochs=4, optimizer="sgd", lr=0.1, weight_decay=5e-4, warmup=0.05, batch_size=128)
TUNE = Finetune(epochs=2, optimizer="sgd", lr=0.05, weight_decay=5e-4, warmup=0.05, batch_size=128)
LOSSES = {
    "labels": TUNE,
    "teacher": TUNE.model_copy(update={"objective": LogitsConfig(temperature=4.0, alpha=0.5)}),
}
CRITERIA: dict[str, Callable[[dict[str, Any]], Any]] = {
    "l1": lambda goal: channels.ChannelL1Config(**goal),
    "l2 alike": lambda goal: channels.ChannelL2Config(scope="alike", **goal),
    "fisher global": lambda goal: channels.ChannelFisherConfig(scope="global", **goal),
    "fisher": lambda goal: channels.ChannelFisherConfig(**goal),
    "l1 reconstructed": lambda goal: channels.ChannelL1Config(reconstruct=True, **goal),
    "fisher global reconstructed": lambda goal: channels.ChannelFisherConfig(scope="global", reconstruct=True, **goal),
}
THEIRS = {"uniform": {"global_pruning": False}, "global": {"global_pruning": True}}


def ours(model: nn.Module, task: Any, criterion: str, ratio: float) -> nn.Module:
    """Cut by one of our criteria to 1/ratio of the FLOPs."""
    goal = {"target": {"measure": "flops", "share": 1 / ratio}, "round_to": 1}
    technique = implement(CRITERIA[criterion](goal))
    analysis = technique.analyze(model, task)
    return technique.transform(copy.deepcopy(model), analysis, task)


def theirs(model: nn.Module, task: Any, kind: str, ratio: float) -> nn.Module:
    """Cut by torch-pruning's group magnitude to at most 1/ratio of the FLOPs, the share found by bisection."""
    import torch_pruning

    inputs = task.example_inputs(1)
    whole = flops(model, inputs)

    def at(share: float) -> nn.Module:
        copied = copy.deepcopy(model)
        pruner = torch_pruning.pruner.BasePruner(
            copied,
            inputs[0],
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            max_pruning_ratio=0.9,
            ignored_layers=[copied.fc],
            round_to=1,
            **THEIRS[kind],
        )
        pruner.step()
        return copied

    low, high = 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if flops(at(middle), inputs) <= whole / ratio else (middle, high)
    return at(high)


def trained(task: Any, seed: int, folder: Path | None) -> nn.Module:
    """Return the network trained with a seed, from the folder when it is there."""
    torch.manual_seed(seed)
    model = zoo.resnet20(in_channels=1, shortcut="project")
    file = folder and folder / f"resnet20-{seed}.safetensors"
    if file and file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    fit(model, model, task, TRAIN, seed=seed)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    return model.eval()


def measured(
    task: Any, model: nn.Module, cut: Callable[..., nn.Module], name: str, ratio: float, loss: str, seed: int
) -> dict[str, Any]:
    """Cut, fine-tune and measure one network."""
    began = time.monotonic()
    compact = cut(model, task, name, ratio)
    raw = task.score(compact, "validation")
    fit(compact, model, task, LOSSES[loss], seed=seed)
    inputs = task.example_inputs(1)
    speed = {size: latency(model, compact, task.example_inputs(size)) for size in (1, 64)}
    return {
        "flops_ratio": flops(model, inputs) / flops(compact, inputs),
        "parameters_ratio": parameters(model) / parameters(compact),
        "validation_before": raw,
        "validation": task.score(compact, "validation"),
        "test": task.score(compact, "test"),
        "original_test": task.score(model, "test"),
        "speed_up": {str(size): [found.low, found.speed_up, found.high] for size, found in speed.items()},
        "seconds": time.monotonic() - began,
    }


def section(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a section of the page: each side's choice at seed 0, over the seeds."""
    lines = [
        "## ResNet-20 with fewer FLOPs",
        "",
        "Fashion-MNIST, cut once, 2 epochs of fine-tuning for either side, last epoch, test split measured once per "
        "run. Criterion and loss of each side were chosen on the validation split at seed 0 (all that were tried are "
        "in the results file). Speed-up: median of paired timings on one thread, and over the seeds.",
        "",
        "| | criterion, loss | seeds | FLOPs | accuracy before | after | drop | speed-up at batch 1 | at batch 64 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ratio in dict.fromkeys(key.split(" | ")[3] for key in results):
        for side in ("rarefy", "torch-pruning"):
            lines += _row(side, ratio, results)
    return "\n".join([*lines, ""])


def _row(side: str, ratio: str, results: dict[str, dict[str, Any]]) -> list[str]:
    entries: dict[str, list[dict[str, Any]]] = {}
    for key, result in sorted(results.items()):
        which, name, loss, times, _ = key.split(" | ")
        if (which, times) == (side, ratio):
            entries.setdefault(f"{name}, {loss}", []).append(result)
    if not entries:
        return []
    choice, runs = max(entries.items(), key=lambda entry: entry[1][0]["validation"])

    def mean(get: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(get(run) for run in runs)

    def middle(batch_size: str) -> float:
        return statistics.median(run["speed_up"][batch_size][1] for run in runs)

    after = [run["test"] for run in runs]
    return [
        f"| {side} | {choice} | {len(runs)} | {mean(lambda r: r['flops_ratio']):.2f}x fewer | "
        f"{mean(lambda r: r['original_test']):.2%} | {mean(lambda r: r['test']):.2%} ({min(after):.2%} to "
        f"{max(after):.2%}) | {100 * mean(lambda r: r['original_test'] - r['test']):+.2f} points | "
        f"{middle('1'):.2f}x | {middle('64'):.2f}x |"
    ]


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 3.0])
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA), help="those to choose among")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task, runs = fashion_mnist(chosen.data), Runs(RESULTS)
    networks = {seed: trained(task, seed, chosen.weights) for seed in chosen.seeds}

    def run(side: str, name: str, loss: str, ratio: float, seed: int) -> dict[str, Any]:
        cut = ours if side == "rarefy" else theirs
        key = f"{side} | {name} | {loss} | {ratio:g}x | seed {seed}"
        return runs.get(key, lambda: measured(task, networks[seed], cut, name, ratio, loss, seed))

    first = chosen.seeds[0]
    for ratio in chosen.ratios:
        ranked = [("rarefy", name, "teacher") for name in chosen.criteria]
        mine = max(ranked, key=lambda entry: run(*entry, ratio, first)["validation"])
        other = max(
            [("torch-pruning", kind, "labels") for kind in THEIRS],
            key=lambda entry: run(*entry, ratio, first)["validation"],
        )
        for seed in chosen.seeds[1:]:
            for entry in (mine, other):
                run(*entry, ratio, seed)


if __name__ == "__main__":
    main()
