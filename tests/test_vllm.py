"""
A real vLLM samples for the trainer: always from the student as it is, whatever the E-step and the teacher do.

Needs an environment with vLLM; `make test-vllm` makes one for a CPU (Makefile).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny


pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parent / "vllm_script.py"
ROOT = Path(__file__).parent.parent
# Nats per token: by what sampling in bfloat16, which vLLM makes of float32 on a CPU, differs, and what an update makes
CLOSE, APART = 0.02, 0.05


def run(scenario, folder):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # A process each: an engine's memory comes back with its process alone
    command = [sys.executable, str(SCRIPT), scenario, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize(
    "scenario", ["shared", "ema", "lora_teacher", "lora_student_and_teacher", "two_batches_in_a_step"]
)
def test_rollouts_come_from_the_student_as_it_is(tmp_path, scenario):
    result = run(scenario, tmp_path)
    records = result["records"]
    assert len(records) == (6 if scenario == "two_batches_in_a_step" else 3)
    print(scenario, records, result["final"])
    for record in records:
        assert record["tokens"] > 20
        assert record["student"] < CLOSE, "sampling's log-probabilities are the trainer's"
    for record in records[1:]:
        assert record["initial"] > APART
        if scenario in ("shared", "ema", "two_batches_in_a_step"):
            assert record["before_e_step"] > APART
        if scenario != "shared" and scenario != "two_batches_in_a_step":
            assert record["teacher"] > APART, "the teacher has weights of its own, which vLLM must not have"
    assert result["final"] < 0.05  # of the worst token
    log = result["log"]
    assert len([row for row in log if "e_step/loss" in row]) >= 2
    assert any("eval_avg@2" in row for row in log)
    if scenario == "shared":
        shares = [row["feedback/critique_discarded"] for row in log if "feedback/critique_discarded" in row]
        assert shares, "critiques were asked for, through the same engine"
        assert all(0 <= share <= 1 for share in shares)


def test_an_evaluation_by_vllm_finds_what_one_by_transformers_finds(tmp_path):
    """Greedily, so that the samples are the same; the command line's form of it, as a process of its own."""
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.model(tokenizer, head_dim=64, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
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
