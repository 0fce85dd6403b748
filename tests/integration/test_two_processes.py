"""Training on two processes of this machine's CPU is the same training as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def logged(folder: Path, name: str) -> list[float]:
    """A loss or rate of every step, over all processes."""
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_two_processes_have_the_losses_and_rates_of_one(tmp_path: Path):
    edge = str(save_tiny_model(tmp_path / "edge"))
    run("-m", "tests.train_tiny", edge, str(tmp_path / "one"), "2")
    run(*LAUNCH, "-m", "tests.train_tiny", edge, str(tmp_path / "two"), "1")
    for name in ("loss", "loss_name", "loss_arguments"):
        one, two = (logged(tmp_path / run, name) for run in ("one", "two"))
        assert len(one) == 4 and len(set(one)) == 4
        assert two == pytest.approx(one, abs=1e-3)
