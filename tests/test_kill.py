"""A run that is killed at random moments and resumed, again and again, ends as one that was left alone."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.kill_script import SCENARIOS
from tests.launching import record
from vpd_trl.checkpoints import find_fault


SCRIPT = Path(__file__).parent / "kill_script.py"
KILLS = 5  # in each scenario
PHASES = ("saving", "generation", "e_step", "m_step", "saving")


def start(scenario, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), scenario, str(folder)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_in(scenario, folder, phase, rng):
    """What a run was doing when it was killed: a random time after the phase began for the second or a later time."""
    process = start(scenario, folder)
    assert process.stdout is not None
    count, wanted, last = 0, rng.randint(1, 2), None
    for line in process.stdout:
        last = line.strip()
        count += last == phase
        if count == wanted:
            time.sleep(rng.uniform(0, 0.04))
            process.kill()
            break
    last = [last, *process.stdout.read().split()][-1]
    process.communicate()
    return last if process.returncode == -9 else f"ended with {process.returncode}"


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_that_is_killed_and_resumed_five_times_ends_as_if_it_had_not_been(tmp_path, scenario):
    rng = random.Random(scenario)
    for folder in ("alone", "killed"):
        (tmp_path / folder).mkdir()
    output, errors = start(scenario, tmp_path / "alone").communicate(timeout=300)
    assert "saving" in output, errors[-3000:]

    moments, damaged = [], 0
    for phase in PHASES[:KILLS]:
        moments.append(killed_in(scenario, tmp_path / "killed", phase, rng))
        damaged += sum(find_fault(path) is not None for path in (tmp_path / "killed").glob("checkpoint-*"))
        assert not (tmp_path / "killed" / "end.pt").exists(), "killed too late"
    print(f"\n{scenario}: killed during {', '.join(map(str, moments))}; {damaged} damaged checkpoints were left")
    if path := os.environ.get("KILL_RECORD"):
        record(
            Path(path),
            scenario,
            {"killed during": moments, "damaged checkpoints": damaged},
            command="KILL_RECORD=examples/accelerate/results/kills.json python -m pytest -m slow tests/test_kill.py",
            what="what each run was doing when it was killed, and how many damaged checkpoints were seen after the kills; "
            "each scenario's run then ended in the weights of one that was left alone",
        )
    assert all(moment in ("ready", *PHASES, "deleting") for moment in moments), moments

    process = start(scenario, tmp_path / "killed")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    alone, killed = (torch.load(tmp_path / f / "end.pt", weights_only=True) for f in ("alone", "killed"))
    assert alone["step"] == killed["step"] == 8
    assert tiny.same(alone["weights"], killed["weights"])
    for part in ("average", "adapter"):
        if part in alone["teacher"]:
            assert tiny.same(alone["teacher"][part], killed["teacher"][part])
