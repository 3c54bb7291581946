"""On how many architectures that nobody here wrote the dependency engine is right.

python -m benchmarks.pruning.coverage torchvision timm      in an environment with these
python -m benchmarks.pruning.coverage transformers          in another
python -m benchmarks.pruning.coverage timm --only 'swin'    names that match an expression
python -m benchmarks.pruning.coverage --self-check          whether the oracle notices wrong cuts
python -m benchmarks.pruning.coverage --table               the table of the results that are there

Results are kept by model in results/pruning-coverage.json, so that the environments add up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import signal
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rarefy import dependencies
from rarefy.files import atomic_write
from torch import nn

from benchmarks.pruning.architectures import INSTALL, LIBRARIES, Architecture, architectures
from benchmarks.pruning.oracle import Record, examine, first_line, place

RESULTS = Path(__file__).parent.parent / "results" / "pruning-coverage.json"
MEMORY = 16 * 2**30
"""Bytes of address space a model may take."""


def sweep(chosen: list[Architecture], timeout: float) -> None:
    """Examine each architecture in a process of its own, print a line about it and keep its result."""
    for number, architecture in enumerate(chosen, 1):
        result = isolated(architecture, timeout)
        keep(f"{architecture.library}/{architecture.name}", result)
        print(f"{number:3}/{len(chosen)} {line(architecture.name, result)}", flush=True)


def isolated(architecture: Architecture, timeout: float) -> dict[str, Any]:
    """Examine one architecture in a forked process, which may crash or take too long."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    began = time.perf_counter()
    process = context.Process(target=child, args=(architecture, timeout, there))
    process.start()
    there.close()
    try:
        result = here.recv() if here.poll(20 * timeout) else lost("timeout", f"not done after {20 * timeout:.0f} s")
    except EOFError:
        process.join()
        text = f"the process ended with code {process.exitcode}"
        spent = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        result = lost("timeout", f"{text}, probably past {timeout:.0f} s") if spent else lost("crash", text)
    process.kill()
    process.join()
    about = {"library": architecture.library, "family": architecture.family, "task": architecture.task}
    return {**about, **result, "seconds": time.perf_counter() - began}


def child(architecture: Architecture, timeout: float, pipe: Connection) -> None:
    """Examine one architecture and send what was found."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(timeout), int(timeout) + 5))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model, inputs = architecture.make()
    except Exception as error:
        record = Record(failures=[{"check": "forward", "error": first_line(error), "place": place(error)}])
    else:
        record = examine(model, inputs, dependencies)
    pipe.send({"status": status(record), **record.measured, "failures": record.failures})


def lost(check: str, text: str) -> dict[str, Any]:
    """Return the result of a model whose process did not answer."""
    return {"status": "fail", "failures": [{"check": check, "error": text, "place": ""}]}


def status(record: Record) -> str:
    """Return `pass`, `fail`, `nothing` (all pinned) or `not run` (the plain model does not run here)."""
    if any(failure["check"] == "forward" for failure in record.failures):
        return "not run"
    if record.failures:
        return "fail"
    return "pass" if record.measured["groups"] else "nothing"


def line(name: str, result: dict[str, Any]) -> str:
    """Return one row of the table."""
    pinned = result.get("pinned_share")
    row = f"{name[:42]:42} {result['status']:8} {'' if pinned is None else f'{pinned:6.1%} pinned':14}"
    row += f" {result.get('analysis_seconds', 0):6.2f} s {result.get('cut_seconds', 0):6.2f} s"
    if result["failures"]:
        failure = result["failures"][0]
        row += f"  {failure['check']}: {failure['error'][:150]}"
        row += f" [{failure['place']}]" if failure["place"] else ""
    return row


def table(models: dict[str, dict[str, Any]]) -> str:
    """Return all rows and what they add up to by library."""
    lines = [line(name, models[name]) for name in sorted(models)]
    for library in sorted({result["library"] for result in models.values()}):
        mine = [result for result in models.values() if result["library"] == library]
        counts = Counter(result["status"] for result in mine)
        ran = [result for result in mine if result["status"] != "not run"]
        families = {result["family"] for result in ran}
        bad = {result["family"] for result in ran if result["status"] != "pass"}
        shares = [result["pinned_share"] for result in ran if "pinned_share" in result]
        lines.append(
            f"{library}: {counts['pass']} of {len(ran)} pass, {counts['fail']} fail, {counts['nothing']} all pinned, "
            f"{counts['not run']} do not run; {len(families - bad)} of {len(families)} families whole; "
            f"pinned share {sum(shares) / max(len(shares), 1):.1%} on average"
        )
    return "\n".join(lines)


def section(results: dict[str, Any]) -> str:
    """Return the results as a section of a page: sums by library, and everything that did not pass."""
    models = results["models"]
    rows = table(models).splitlines()
    sums = rows[len(models) :]
    others = [line(name, models[name]) for name in sorted(models) if models[name]["status"] not in ("pass", "not run")]
    return "\n".join(
        [
            "## Architectures that the dependency engine prunes",
            "",
            "Models of other libraries, random weights, half of the units of every prunable group cut at once; one "
            "passes when the cut model equals the masked one (groups that change statistics aside), runs with all of "
            "them cut, and a second analysis of it agrees. No code is specific to a model. The results come from "
            "several versions of the engine of one day.",
            "",
            *(f"- {text}" for text in sums),
            "",
            "Not passed:",
            "",
            "```text",
            *others,
            "```",
            "",
        ]
    )


# --- does the oracle notice? ------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two convolutions with a norm between them, and a linear layer after pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def shifted(model: nn.Module, found: dependencies.Dependencies, removal: dependencies.Removal) -> nn.Module:
    """Cut the same number of units, but other ones of the tensors that consume them."""
    compact = dependencies.cut(model, found, removal)
    with torch.no_grad():
        for parameter in compact.parameters():
            if parameter.dim() > 1 and parameter.shape[1] > 1:
                parameter.copy_(parameter.roll(1, 1))
    return compact


def uncut(model: nn.Module, found: dependencies.Dependencies, removal: dependencies.Removal) -> nn.Module:
    """Return the masked model for the compact one."""
    return dependencies.mask(model, found, removal)


def self_check() -> None:
    """Show that a right engine passes and that each wrong one fails; raise `SystemExit` otherwise."""
    right = {"find_dependencies": dependencies.find_dependencies, "cut": dependencies.cut, "mask": dependencies.mask}
    engines = {
        "right": right,
        "cuts other inputs": right | {"cut": shifted},
        "cuts nothing": right | {"cut": uncut},
        "masks nothing": right | {"mask": lambda model, found, removal: model},
    }
    for name, parts in engines.items():
        torch.manual_seed(0)
        record = examine(Small(), (torch.randn(2, 3, 12, 12),), SimpleNamespace(**parts))
        print(f"{name}: {status(record)} {[f['check'] for f in record.failures]}")
        if (status(record) == "pass") != (name == "right"):
            raise SystemExit(f"the oracle is blind: {name!r} gives {record}")


def main() -> None:
    """Sweep over libraries and write and print what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=INSTALL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="*", metavar="library", help=", ".join(LIBRARIES))
    parser.add_argument("--only", default="", help="regular expression that a model's name must match")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of processor time a model may take")
    parser.add_argument("--self-check", action="store_true", help="check the oracle itself")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    options = parser.parse_args()
    if options.self_check:
        self_check()
    for library in options.libraries:
        chosen = [a for a in architectures(library) if re.search(options.only, a.name)]
        sweep(chosen, options.timeout)
    if options.libraries or options.table:
        models = stored()["models"]
        wanted = options.libraries or list(LIBRARIES)
        print(table({name: result for name, result in models.items() if result["library"] in wanted}))


def keep(name: str, result: dict[str, Any]) -> None:
    """Add a result to those that are there, which another environment may be writing too."""
    kept = stored()
    kept["models"][name] = result
    kept["torch"] = str(torch.__version__)
    text = re.sub(r"/[^\s\"]*/site-packages/", "", json.dumps(kept, indent=1, sort_keys=True))
    with atomic_write(RESULTS) as path:
        path.write_text(text + "\n")


def stored() -> dict[str, Any]:
    """Return the results that are there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}


if __name__ == "__main__":
    main()
