"""The README is true: its code runs, its fields exist, its numbers come from a file."""

import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig

from tests import tiny
from vpd_trl import VPDConfig


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEW_FIELDS = [f for f in fields(VPDConfig) if f.name not in {g.name for g in fields(GRPOConfig)}]


def test_every_new_config_field_is_in_the_readmes_table_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, flags=re.M))
    for f in NEW_FIELDS:
        assert f.name in rows, f.name
        if rows[f.name] != "a section":
            assert eval(rows[f.name].strip("`")) == f.default, f.name


def test_every_new_config_field_has_help_and_is_in_the_docstring():
    for f in NEW_FIELDS:
        assert f.metadata["help"]
        assert f"\n        {f.name} (" in VPDConfig.__doc__, f.name


def test_what_it_says_of_vllm_is_in_the_results_file():
    scenarios = json.loads((ROOT / "examples/accelerate/results/vllm_cpu.json").read_text())["scenarios"]
    assert {"shared", "ema", "lora_teacher", "lora_student_and_teacher", "server"} <= scenarios.keys()
    batches = [batch for scenario in scenarios.values() for batch in scenario["batches"]]
    worst = max(batch["student"] for batch in batches)
    own = ("ema", "lora_teacher", "lora_student_and_teacher")
    others = [b[k] for s in scenarios.values() for b in s["batches"][1:] for k in ("initial", "before_e_step")]
    others += [batch["teacher"] for name in own for batch in scenarios[name]["batches"][1:]]
    told = re.search(
        r"student's to ([\d.]+) nats a token, where older weights or another teacher's are ([\d.]+)",
        " ".join(README.split()),
    )
    assert float(told[1]) >= worst > float(told[1]) - 0.001
    assert float(told[2]) == round(min(others), 2)


def test_every_metric_that_a_run_logs_is_in_the_readme(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=2)
    trainer.train()
    logged = {name for row in trainer.state.log_history for name in row if "/" in name}
    ours = {n for n in logged if n.split("/")[0] in ("feedback", "e_step", "m_step", "teacher", "time")}
    assert len(ours) >= 13
    assert all(f"`{name}`" in README for name in ours), [n for n in ours if f"`{n}`" not in README]


def test_the_rewards_example_gives_what_it_says():
    pytest.importorskip("math_verify")
    code = README.split("## Rewards")[1].split("```python\n")[1].split("```")[0]
    scope: dict = {}
    for line in filter(None, code.splitlines()):
        call, _, value = line.partition("  # ")
        if value:
            assert eval(call, scope) == eval(value), line
        else:
            exec(call, scope)


def test_the_evaluation_example_runs_from_a_script_and_within_training(tmp_path, tokenizer, monkeypatch, capsys):
    code = README.split("## Evaluation")[1].split("```python\n")[1].split("```")[0]
    tiny.model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": "ABCD"[i % 4]} for i in range(3)]
    scope: dict = {"test_set": rows}
    code = code.replace('"Qwen/Qwen3-0.6B"', '"model"').replace("k=16", "k=16, sampling=short")
    from vpd_trl.evaluation import Sampling

    scope["short"] = Sampling(max_new_tokens=4)
    exec(code, scope)
    assert all(name in capsys.readouterr().out for name in ("avg@16",)), "the result is printed"
    assert {"avg@16", "pass@1", "pass@16", "majority@16"} <= set(scope["result"].metrics)
    assert (tmp_path / "results" / "qwen3" / "summary.json").exists()
    trainer = tiny.trainer(
        tmp_path / "run",
        tok=tokenizer,
        evaluation=scope["evaluation"],
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    logged = {name for row in trainer.state.log_history for name in row}
    assert {"eval_avg@16", "eval_truncated", "eval_mean_tokens"} <= logged
    assert all(f"| `{name}` |" in README for name in ("eval_truncated", "eval_mean_tokens"))


def test_the_metrics_of_rewards_are_in_the_table():
    pytest.importorskip("math_verify")
    from vpd_trl.rewards import choice_reward, math_reward

    for function, answer in ((choice_reward, "B"), (math_reward, "1")):
        names: set[str] = set()
        function(completions=[answer], answer=[answer], log_metric=lambda name, value: names.add(name))  # noqa: B023
        assert names
        for name in names:
            assert f"| `{name.replace(function.__name__, '{name}')}` |" in README


def test_the_quick_start_runs(tmp_path, tokenizer, monkeypatch):
    code = README.split("## Quick start")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    tiny.model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    code = code.replace('"Qwen/Qwen3-0.6B"', '"model"')
    small = "max_steps=2, max_completion_length=4, bf16=False, use_cpu=True, report_to='none'"
    code = code.replace('VPDConfig("qwen3-vpd")', f'VPDConfig("qwen3-vpd", {small})')
    scope: dict = {}
    exec(code, scope)
    assert scope["trainer"].state.global_step == 2


@pytest.mark.parametrize("result", sorted((ROOT / "examples/demo/results").glob("vpd.json")), ids=lambda p: p.name)
def test_the_demos_table_comes_from_its_results_file(result, monkeypatch):
    table = README.split("<!-- demo-table -->\n")[1].split("\n<!-- /demo-table -->")[0]
    numbers = json.loads(result.read_text())
    assert {"command", "commit", "seed", "machine"} <= numbers.keys()
    rows = ["| held-out sums | right answers | accuracy | 95 % interval |", "|---|---|---|---|"]
    for name in ("before", "after"):
        r = numbers[name]
        rows.append(
            f"| {name} training | {r['right']} of {r['samples']} | {r['right'] / r['samples']:.1%} | "
            f"{r['low']:.1%} – {r['high']:.1%} |"
        )
    assert table == "\n".join(rows)


def test_the_demos_reward_reads_answers_from_free_text():
    if importlib.util.find_spec("reasoning_gym") is None:
        sys.modules.setdefault("reasoning_gym", type(sys)("reasoning_gym"))
    spec = importlib.util.spec_from_file_location("demo_task", ROOT / "examples/demo/task.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    cases = {
        "4 + 7 = 11.": "11",
        "The answer is 11": "11",
        "The answer is: 11, of course": "11",
        "11": "11",
        "It's eleven": None,
        "4 and 7 make 11": None,
        "3 - 5 = -2": "-2",
    }
    assert {text: task.extract(text) for text in cases} == cases
    said, ids = [[{"content": text}] for text in ("= 11", "= 1", "= 11")], [[5, task.END], [5, task.END], [5, 6]]
    assert task.sum_reward(said, ["11"] * 3, ids) == [1.0, 0.0, 0.0]
    right, wrong = task.sum_feedback(["11", "11"], ["4 + 7", "4 + 7"], [True, False])
    assert "right" in right
    assert "wrong" in wrong
    assert "4 + 7 = 11" in wrong
