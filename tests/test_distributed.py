"""Two processes (gloo, CPU), started as a user would, train one model and never wait for each other for ever."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny


SCRIPT = Path(__file__).parent / "distributed_script.py"


def launch(scenario, folder, processes=2, *, fails=False):
    """The results of each process; a hang is a failure."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    # "multi_gpu" picks the launcher of several processes; the environment says that they run on CPUs
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(SCRIPT), scenario, str(folder)]
    if processes == 1:
        command = [sys.executable, str(SCRIPT), scenario, str(folder)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, env=env, timeout=240, capture_output=True, text=True)
    assert (done.returncode != 0) is fails, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(folder / f"world{processes}_rank{i}.pt", weights_only=False) for i in range(processes)]


def test_two_processes_stay_one_model_and_equal_one_process(tmp_path):
    first, second = launch("plain", tmp_path)
    assert tiny.same(first["weights"], second["weights"]), "the ranks were trained apart"
    (alone,) = launch("plain", tmp_path, processes=1)
    initial = tiny.weights(tiny.model(tiny.tokenizer()))
    assert not tiny.same(initial, alone["weights"])
    for name, weight in alone["weights"].items():
        assert torch.allclose(weight, first["weights"][name], atol=2e-6, rtol=1e-4), name
    two, one = ([r for r in log if "e_step/loss" in r] for log in (first["log"], alone["log"]))
    assert len(two) == len(one) == 3
    for a, b in zip(two, one, strict=True):
        for name in (
            "e_step/loss",
            "e_step/reward_margin",
            "e_step/reward_shift",
            "m_step/divergence",
            "m_step/tokens",
        ):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["no_feedback_on_one", "no_success_on_one", "no_success", "copies", "sampled"])
def test_ranks_stay_one_model_and_do_not_hang(tmp_path, scenario):
    first, second = launch(scenario, tmp_path)
    assert tiny.same(first["weights"], second["weights"])
    last = [row for row in first["log"] if "m_step/tokens" in row][-1]
    if scenario == "no_feedback_on_one":
        assert last["feedback/coverage"] == 0.5
    if scenario == "no_success":
        assert last["e_step/skipped"] == 1.0
    if scenario == "no_success_on_one":
        assert last["e_step/skipped"] == 0.0
    if scenario == "copies":
        assert tiny.same(first["average"], second["average"])
        assert not tiny.same(first["average"], first["weights"])


@pytest.mark.slow
def test_a_feedback_function_that_raises_on_one_rank_stops_all_with_its_error(tmp_path):
    first, second = launch("raises_on_one", tmp_path, fails=True)
    assert "the judge is out of office" in first["error"]
    assert "Process 1 failed" in first["error"]
    assert "the judge is out of office" in second["error"]


@pytest.mark.slow
def test_siblings_are_looked_up_over_processes(tmp_path):
    first, second = launch("siblings", tmp_path)
    assert all(len(others) == 7 for _, others in first["seen"] + second["seen"])
    # 4 rollouts a rank: the one group of 8 spans both
    for a, b in zip(*(result["seen"][:4] for result in (first, second)), strict=True):
        assert sorted([a[0], *a[1]]) == sorted([b[0], *b[1]])
    both = sorted(text for result in (first, second) for text, _ in result["seen"][:4])
    text, others = first["seen"][0]
    assert sorted([text, *others]) == both
