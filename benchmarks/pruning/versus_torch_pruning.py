"""Time to analyze a network and cut half of its channels, against torch-pruning, and what each can prune.

python -m benchmarks.pruning.versus_torch_pruning [--runs N]

Both get the same networks and inputs in one process, in turns; a run is everything from the model as it is to the cut
model: `find_dependencies` and `cut` here, with its trials of every group and without; `BasePruner` (which builds its
graph) and `step` there. Scores are random on both sides. torch-pruning is told what its own examples tell it: to leave
the classifier alone, the number of heads, and which attributes to correct afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rarefy.dependencies import cut, find_dependencies
from torch import nn

from benchmarks.pruning.architectures import INSTALL
from benchmarks.pruning.oracle import choose

RESULTS = Path(__file__).parent.parent / "results" / "pruning-versus-torch-pruning.json"


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Return what is compared: constructors by name."""
    import timm
    import torchvision

    return {
        "torchvision resnet50": torchvision.models.resnet50,
        "torchvision vit_b_16": torchvision.models.vit_b_16,
        "timm vit_base_patch16_224": lambda: timm.create_model("vit_base_patch16_224", pretrained=False),
    }


def with_rarefy(model: nn.Module, inputs: torch.Tensor, verify: bool = True) -> nn.Module:
    """Cut half of the units of every group."""
    found = find_dependencies(model, (inputs,), verify=verify)
    return cut(model, found, choose(model, found.groups, "position"))


def with_torch_pruning(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Cut half of the channels of every layer but the last, in place."""
    import torch_pruning as tp

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[last],
        num_heads=heads,
    )
    pruner.step()
    patch_(model, pruner.num_heads)
    return model


def patch_(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Correct by hand, as torch-pruning's examples do, what it leaves stale in these networks."""
    if hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels
    for module in model.modules():
        if getattr(module, "qkv", None) in heads:
            module.num_heads = heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim


def compare(make: Callable[[], nn.Module], runs: int) -> dict[str, Any]:
    """Time both in turns on one network; report medians, the median of the paired ratios, and what each cut."""
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(1, 3, 224, 224)
    sides = {
        "rarefy": with_rarefy,
        "rarefy_untried": partial(with_rarefy, verify=False),
        "torch_pruning": with_torch_pruning,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    result: dict[str, Any] = {}
    for _ in range(runs):
        for name, work in sides.items():
            mine = copy.deepcopy(model)
            began = time.perf_counter()
            try:
                small = work(mine, inputs)
                seconds[name].append(time.perf_counter() - began)
                with torch.no_grad():
                    small(inputs)
                result[name] = outcome(model, small)
            except Exception as error:
                result[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    for name, times in seconds.items():
        result[name] |= {"seconds": statistics.median(times) if times else None, "all_seconds": times}
    if all(len(times) == runs for times in seconds.values()):
        result["time_ratio"] = {
            name: statistics.median(a / b for a, b in zip(seconds[name], seconds["torch_pruning"], strict=True))
            for name in ("rarefy", "rarefy_untried")
        }
    return result


def outcome(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """Return which share of the parameters lies in tensors that shrank, and which share is left."""
    sizes = {name: parameter.shape for name, parameter in after.named_parameters()}
    total = sum(parameter.numel() for parameter in before.parameters())
    shrunk = sum(p.numel() for name, p in before.named_parameters() if sizes.get(name) != p.shape)
    return {"prunable_share": shrunk / total, "left_share": sum(p.numel() for p in after.parameters()) / total}


def section(results: dict[str, Any]) -> str:
    """Return the results as a section of a page."""
    lines = [
        "## Time to analyze and cut",
        "",
        "From the model to one with half of its channels, at 224 x 224, one thread; median of paired runs in one "
        f"process, beside torch-pruning {results['torch_pruning']}, which tries nothing. Above 1 rarefy takes longer.",
        "",
        "| network | every group tried | nothing tried | torch-pruning | prunable parameters, ours | theirs |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["networks"].items():
        ours, untried, theirs = row["rarefy"], row["rarefy_untried"], row["torch_pruning"]
        ratios = row["time_ratio"]
        lines.append(
            f"| {name} | {ours['seconds']:.2f} s ({ratios['rarefy']:.1f}x) | {untried['seconds']:.2f} s "
            f"({ratios['rarefy_untried']:.1f}x) | {theirs['seconds']:.2f} s | {ours['prunable_share']:.2%} | "
            f"{theirs['prunable_share']:.2%} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Compare on all networks, write and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=INSTALL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each side")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        import torch_pruning

        chosen = networks()
    except ImportError as error:
        raise SystemExit(f"{error}\n{INSTALL}") from error
    results = {
        "torch": str(torch.__version__),
        "torch_pruning": getattr(torch_pruning, "__version__", "unknown"),
        "networks": {name: compare(make, options.runs) for name, make in chosen.items()},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results["networks"].items():
        print(name, json.dumps(row))


if __name__ == "__main__":
    main()
