"""The documented launch on two processes gives equal weights and a result within noise of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

RECIPE = """\
name: two
model: zoo:digits_cnn
task: data:digits
train_first: {epochs: 6, lr: 0.003, batch_size: 32}
evaluate: {batch_sizes: []}
steps:
  - technique: pruning/magnitude
    amount: 0.5
    finetune: {epochs: 3, lr: 0.002, batch_size: 32}
"""

# a plugin that makes each process write down a fingerprint of its weights, and at its end whether the group still is
WITNESS = """\
import atexit, hashlib, os
import torch
from rarefy.hookspecs import hookimpl

@atexit.register
def last():
    with open(f"end{os.environ['RANK']}.txt", "a") as file:
        file.write(str(torch.distributed.is_initialized()))

@hookimpl(wrapper=True)
def finetune(technique, model, teacher, task, config, seed):
    trained = yield
    data = b"".join(p.detach().numpy().tobytes() for p in trained.model.parameters())
    with open(f"rank{os.environ['RANK']}.txt", "a") as file:
        file.write(hashlib.sha256(data).hexdigest() + " " + str(torch.distributed.get_world_size()) + "\\n")
    return trained
"""


def test_two_processes_agree_and_match_one(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "witness.py").write_text(WITNESS)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    two = [*launch, "rarefy", "--quiet", "--plugin", "witness.py", "run", "r.yaml", "-o", "two"]
    done = subprocess.run(two, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ranks = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0].splitlines()) == 2
    assert all(line.endswith(" 2") for line in ranks[0].splitlines())
    assert [(tmp_path / f"end{rank}.txt").read_text() for rank in (0, 1)] == ["False", "False"]

    one = [sys.executable, "-m", "rarefy", "--quiet", "run", "r.yaml", "-o", "one"]
    subprocess.run(one, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=240)
    scores = [json.loads((tmp_path / name / "report.json").read_text())["test"][1]["value"] for name in ("one", "two")]
    assert abs(scores[0] - scores[1]) < 0.04
    assert min(scores) > 0.85
