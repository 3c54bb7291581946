"""The command line: results, exit codes, messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from rarefy_schemas import Coding

RECIPE = """\
name: cli
model: zoo:digits_cnn
task: data:digits
train_first: {epochs: 2, lr: 0.003}
evaluate: {batch_sizes: [1], rounds: 3}
steps:
  - technique: pruning/magnitude
    amount: 0.5
    finetune: {epochs: 1}
"""


@pytest.fixture
def rarefy(rarefy: Any, tmp_path: Path) -> Any:
    """Put the recipe into the folder in which commands run."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    return rarefy


def test_a_run_and_everything_that_looks_at_it(rarefy: Any) -> None:
    code, out, err = rarefy("--quiet", "run", "r.yaml", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["directory"] == str(Path("runs/cli"))
    file = "runs/cli/exports/" + Path(report["exports"][0]["path"]).name

    code, out, _ = rarefy("evaluate", file, "--json")
    assert json.loads(out)["value"] == report["test"][1]["value"]
    code, out, _ = rarefy("evaluate", file)
    assert out.startswith("accuracy on test: ")

    code, out, _ = rarefy("inspect", file, "--json")
    assert {row["coding"] for row in json.loads(out)["tensors"]} <= set(get_args(Coding))
    code, out, _ = rarefy("inspect", file)
    assert "base: zoo:digits_cnn" in out

    code, out, _ = rarefy("analyze", file, "--json")
    assert all(row["flops"] is not None for row in json.loads(out))

    code, out, _ = rarefy("export", file, "--to", "safetensors", "--output", "other", "--json")
    assert json.loads(out)["max_difference"] == 0
    assert list(Path("other").iterdir())

    changes = ["steps.0.amount=0.8", "budgets.bytes=10", "export=[rarefy, safetensors]"]
    code, out, err = rarefy("--quiet", "run", "r.yaml", *(part for change in changes for part in ("--set", change)))
    assert code == 3
    assert "this file is not smaller than the original's float32 file" in out.splitlines()[-1]
    assert "budget missed: bytes is" in err
    code, out, _ = rarefy("compare", "runs/cli", "runs/cli-2", "--html", "both.html", "--json")
    assert len(json.loads(out)) == 2
    assert "<html" in Path("both.html").read_text()

    code, out, err = rarefy("run", "r.yaml", "--output", "runs/cli")
    assert code == 2
    assert "already holds a run" in err
    code, out, err = rarefy("--quiet", "run", "--resume", "runs/cli", "--json")
    assert (code, json.loads(out)["test"]) == (0, report["test"])


def test_a_dry_run_prints_the_plan_and_writes_nothing(rarefy: Any) -> None:
    code, out, _ = rarefy("run", "r.yaml", "--dry-run", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["step"] for row in rows] == ["original", "pruning/magnitude"]
    assert rows[0]["parameters"] == rows[1]["parameters"] > 0
    assert rows[0]["flops"] > 0
    assert not Path("runs").exists()
    code, out, err = rarefy("run", "r.yaml", "--dry-run", "--set", "steps.0.targets.include=[x]")
    assert code == 2
    assert "no layer matches" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run",), 2, "name a RECIPE"),
        (("run", "none.yaml"), 2, "cannot read the recipe"),
        (("run", "--resume", "none"), 2, "holds no run to resume"),
        (("run", "r.yaml", "--set", "steps.0.amount=2"), 2, "less than 1"),
        (("run", "r.yaml", "--set", "model=zoo:lenet6"), 2, "Did you mean 'lenet5'"),
        (("run", "r.yaml", "--set", "model=zo:lenet5"), 2, "Did you mean 'zoo'"),
        (("run", "r.yaml", "--set", "task=data:digit"), 2, "Did you mean 'digits'"),
        (("validate", "none.yaml"), 2, "cannot read"),
        (("techniques", "pruning/magnitud"), 2, "Did you mean 'pruning/magnitude'"),
        (("evaluate", "none.rarefy"), 1, "none.rarefy"),
        (("inspect", "r.yaml"), 1, "not a rarefy artifact"),
        (("export", "none.rarefy", "--to", "onx"), 2, "Did you mean 'onnx'"),
        (("compare", "none"), 2, "no report"),
        (("analyze", "zoo:nothing"), 2, "Allowed"),
        (("--plugin", "none.py", "techniques"), 4, "there is no file"),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_bad_input(rarefy: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, _, err = rarefy(*arguments)
    assert message in err
    assert found == code
    assert "Traceback" not in err


def test_listing_commands(rarefy: Any) -> None:
    code, out, _ = rarefy("techniques", "--json")
    assert "pruning/magnitude" in {row["technique"] for row in json.loads(out)}
    code, out, _ = rarefy("techniques", "pruning/magnitude")
    assert "amount" in out
    assert "paper:" in out
    for option in ("targets.exclude", "finetune.objective", "finetune.weight_decay"):
        assert option in out
    code, out, _ = rarefy("techniques", "quantization/uniform", "--json")
    assert {"target", "target.measure", "target.most"} <= {row["option"] for row in json.loads(out)["options"]}
    code, out, _ = rarefy("techniques")
    assert "pruning/magnitude" in out
    code, out, _ = rarefy("plugins", "list", "--json")
    assert {row["state"] for row in json.loads(out)} == {"installed"}
    code, out, _ = rarefy("plugins", "check", "--json")
    assert (code, json.loads(out)["broken"]) == (0, {})
    code, out, _ = rarefy("doctor", "--json")
    assert code == 0
    assert "torch" in {row["what"] for row in json.loads(out)}
    code, out, _ = rarefy("validate", "r.yaml")
    assert "is valid" in out
    code, out, _ = rarefy("schema", "--output", "s.json")
    assert json.loads(Path("s.json").read_text())["title"] == "rarefy recipe"
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = rarefy("completion", shell)
        assert "_RAREFY_COMPLETE" in out


def test_analyze_says_what_a_technique_would_do(rarefy: Any) -> None:
    arguments = ("analyze", "zoo:digits_cnn", "--task", "data:digits", "--technique", "pruning/magnitude")
    code, out, err = rarefy(*arguments, "--set", "amount=0.5", "--json")
    assert code == 0, err
    assert json.loads(out)["layers"]
    code, out, err = rarefy(*arguments)
    assert code == 2
    assert "amount" in err


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rarefy", *arguments]


def test_ctrl_c_exits_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("epochs: 2", "epochs: 500"))
    process = subprocess.Popen(
        command("run", "r.yaml"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a job in the background ignores the signal, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "training the model" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # a shell calls both 130: CPython ends by the signal itself when it came inside of `exec`, as in imports
    assert process.returncode in (130, -signal.SIGINT)
    assert "--resume" in err
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, trial: int) -> None:
    import random

    text = RECIPE + "  - {technique: quantization/kmeans, bits: 4, finetune: {epochs: 2}}\n"
    (tmp_path / "r.yaml").write_text(text)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(
        command("--quiet", "run", "r.yaml", "-o", "whole"), cwd=tmp_path, check=True, env=env, capture_output=True
    )
    length = time.monotonic() - began
    process = subprocess.Popen(
        command("--quiet", "run", "r.yaml", "-o", "cut"), cwd=tmp_path, env=env, stdout=subprocess.DEVNULL
    )
    time.sleep(random.Random(trial).uniform(0.2, 0.85) * length)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    arguments = ("--resume", "cut") if (tmp_path / "cut" / "recipe.yaml").exists() else ("r.yaml", "-o", "cut")
    subprocess.run(command("--quiet", "run", *arguments), cwd=tmp_path, check=True, env=env, capture_output=True)
    for file in (tmp_path / "whole" / "exports").iterdir():
        assert (tmp_path / "cut" / "exports" / file.name).read_bytes() == file.read_bytes()
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "cut")]
    assert reports[0]["test"] == reports[1]["test"]
    timed = ("latency", "speed_up")
    stages = [[report["baseline"], *report["steps"]] for report in reports]
    figures = [
        [(m["name"], m["value"]) for s in stage for m in s["measurements"] if not m["name"].startswith(timed)]
        for stage in stages
    ]
    assert figures[0] == figures[1]
    assert [s["training"] for s in reports[0]["steps"]] == [s["training"] for s in reports[1]["steps"]]
