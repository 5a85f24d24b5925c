"""Every metric and the completions table reach the trackers, each read back by what it wrote."""

import json
import sqlite3
import struct
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.integrations import TensorBoardCallback

from tests import tiny
from vpd_trl.evaluation import Evaluation, Sampling
from vpd_trl.tracking import MOST_ROWS, CompletionsTable, as_text, completions_table


# Logged once, at the end of a run: a summary, not a curve
SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
TABLE = ["step", "prompt", "completion", "parity_reward", "feedback", "advantage"]
TEXT = "a | b\n<b>c</b> `d` *e*"


def said(answer, **kwargs):
    return [TEXT for _ in answer]


def tracked(folder, tracker, **changes):
    """A trained trainer, the values that it logged by the tracker's names and steps, and its rollouts' texts."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i)} for i in range(2)]
    completions = []

    def parity_reward(prompts, completion_ids, **kwargs):
        completions.extend(zip(prompts, kwargs["completions"], strict=True))
        return tiny.parity_reward(completion_ids)

    trainer = tiny.trainer(
        folder,
        report_to=tracker,
        max_steps=2,
        data=tiny.dataset(16, conversational=True),
        feedback_fn=said,
        reward_funcs=parity_reward,
        log_completions=True,
        evaluation=Evaluation(rows, tiny.parity_reward, k=2, sampling=Sampling(max_new_tokens=2)),
        eval_strategy="steps",
        eval_steps=1,
        **changes,
    )
    trainer.train()
    logged = defaultdict(dict)
    for row in trainer.state.log_history:
        for name, value in row.items():
            if name != "step" and name not in SUMMARY:
                name = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                logged[name][row["step"]] = value
    for phase in ("e_step/loss", "m_step/divergence", "teacher/log_ratio_margin", "feedback/coverage", "time/m_step"):
        assert f"train/{phase}" in logged
    assert "eval/avg@2" in logged
    return trainer, logged, completions


def check_table(rows, trainer, completions):
    """A table's rows, a dictionary each, are of the last rollouts."""
    last = completions[-8:]
    assert len(rows) == 8
    assert all(list(row) == TABLE for row in rows)
    assert [row["step"] for row in rows] == [2] * 8
    assert [as_text(row["prompt"]) for row in rows] == [as_text(prompt) for prompt, _ in last]
    assert [as_text(row["completion"]) for row in rows] == [as_text(completion) for _, completion in last]
    assert [row["feedback"] for row in rows] == [TEXT] * 8
    assert [row["parity_reward"] for row in rows] == list(trainer._logs["rewards"]["parity_reward"])
    assert [row["advantage"] for row in rows] == list(trainer._logs["advantages"])


def test_tensorboard_has_all_metrics_and_the_completions(tmp_path, caplog):
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with caplog.at_level("WARNING"):
        _, logged, completions = tracked(tmp_path, "tensorboard")
    assert "attempting to log a value of" not in caplog.text
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    for name, values in logged.items():
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(values), name
    entries = events.Tensors("completions/text_summary")
    assert [entry.step for entry in entries] == [1, 2], "one for each rollout batch, not for each entry of the log"
    header, _, *rows = entries[-1].tensor_proto.string_val[0].decode().splitlines()
    assert header == "| prompt | completion | parity&#95;reward | feedback | advantage |"
    assert len(rows) == 8
    assert rows[0].count("|") == header.count("|")
    assert "| a &#124; b<br>&lt;b&gt;c&lt;/b&gt; &#96;d&#96; &#42;e&#42; |" in rows[0]
    assert rows[0].startswith(f"| {as_text(completions[-8][0])} | ")


def test_trackio_has_all_metrics_and_the_completions_as_text(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="needs pip install trackio")
    from trackio import sqlite_storage, utils

    for module in (trackio, utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    trainer, logged, completions = tracked(tmp_path, "trackio", project="vpd", run_name="tiny")
    with sqlite3.connect(tmp_path / "trackio" / "vpd.db") as connection:
        entries = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    found = defaultdict(dict)
    for entry in entries:
        for name, value in entry.items():
            if "train/global_step" in entry:
                found[name][entry["train/global_step"]] = value
    for name, values in logged.items():
        assert found[name] == pytest.approx(values), name
    tables = [entry["completions"]["_value"] for entry in entries if "completions" in entry]
    check_table(tables[-1], trainer, completions)
    # Its dashboard shows a conversation as "[object Object]"
    assert all(isinstance(row[name], str) for table in tables for row in table for name in ("prompt", "completion"))


def test_weights_and_biases_has_all_metrics_and_the_completions(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        trainer, logged, completions = tracked(tmp_path / "out", "wandb")
    finally:
        wandb.finish()
    (run,) = tmp_path.glob("wandb/offline-run-*")
    (file,) = run.glob("run-*.wandb")
    found, tables = defaultdict(dict), []
    for entry in history(whole(file)):
        for name, value in entry.items():
            if "train/global_step" in entry:
                found[name][entry["train/global_step"]] = value
        if "completions.path" in entry:
            tables.append(json.loads((run / "files" / entry["completions.path"]).read_text()))
    for name, values in logged.items():
        assert found[name] == pytest.approx(values), name
    rows = [dict(zip(tables[-1]["columns"], row, strict=True)) for row in tables[-1]["data"]]
    check_table(rows, trainer, completions)


def whole(file):
    """The bytes of an offline run's file once the run's exit is in it: `finish` does not wait for that."""
    for _ in range(1000):
        content = file.read_bytes()
        if any(record.WhichOneof("record_type") == "exit" for record in records(content)):
            return content
        time.sleep(0.01)
    raise AssertionError(f"{file} has no end")


def history(content):
    for record in records(content):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(content):
    """The records of an offline run's file: in blocks, as in a log of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, block, record = 7, 32768, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # no room for a header
            place += block - place % block
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        if place + 7 + size > len(content):
            return
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(record)
            record = b""


def test_the_table_is_written_to_the_folder_as_it_was_for_other_trackers(tmp_path):
    import pandas as pd

    trainer, _, completions = tracked(tmp_path, "none")
    rows = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert list(rows.columns) == TABLE
    assert list(rows["prompt"][0]) == completions[-8][0]
    assert not isinstance(trainer._logs["prompt"][0], str)


def test_a_metric_without_a_value_is_not_logged(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    assert None not in trainer.state.log_history[0].values()
    trainer._record("m_step/divergence", float("nan"))
    trainer._record("m_step/divergence", 0.5)
    assert trainer._metrics["train"]["m_step/divergence"] == [0.5]


def test_a_table_is_written_to_tensorboard_once_however_often_is_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")

    def row(completion):
        return {"prompt": ["1+1="], "completion": [completion], "rewards": {}, "extra": {}, "advantages": [0.5]}

    written = []
    board = TensorBoardCallback(SimpleNamespace(add_text=lambda name, text, step: written.append((step, text))))
    trainer = SimpleNamespace(
        log_completions=True, callback_handler=SimpleNamespace(callbacks=[board]), _logs=row("2")
    )
    callback, args = CompletionsTable(trainer), SimpleNamespace(report_to=["tensorboard"])
    for step, completion in [(1, "2"), (1, "2"), (2, "3"), (2, "3"), (3, "2")]:
        trainer._logs = row(completion)
        callback.on_log(args, SimpleNamespace(is_world_process_zero=True, global_step=step), None)
    assert written == [(step, completions_table(row(c))) for step, c in [(1, "2"), (2, "3"), (3, "2")]]


def test_the_table_in_markdown_holds_so_many_rollouts_and_no_more():
    n = MOST_ROWS + 1
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": [{"type": "text", "text": "2"}]}]
    logs = {
        "prompt": [turns] * n,
        "completion": ["x\ny"] * n,
        "rewards": {"r|s": [0.25, *[float("nan")] * n]},
        "extra": {"feedback": [None] * n},
        "advantages": [1 / 3] * n,
    }
    lines = completions_table(logs).splitlines()
    assert len(lines) == MOST_ROWS + 2
    assert lines[0] == "| prompt | completion | r&#124;s | feedback | advantage |"
    assert lines[2] == "| user: 1+1=<br>assistant: 2 | x<br>y | 0.25 |  | 0.3333 |"
    empty = {"prompt": [], "completion": [], "rewards": {}, "extra": {}, "advantages": []}
    assert completions_table(empty) == ""


def test_tool_calls_are_in_a_conversations_text():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    asks = {"role": "assistant", "content": "Let me add.", "tool_calls": [call, call]}
    turns = [{**asks, "content": None, "tool_calls": [call]}, {"role": "tool", "name": "add", "content": "sum 3"}]
    turns += [{"role": "assistant", "content": " <think>so</think>3\n", "tool_calls": None}]
    shown = "[call] add(a=1, b=2)"
    assert as_text(turns) == f"assistant: {shown}\ntool: sum 3\nassistant:  <think>so</think>3\n"
    assert as_text([asks]) == f"Let me add.\n{shown}\n{shown}"
    plain = [{"role": "assistant", "content": f"{shown}\nDone"}]
    assert as_text(plain) == "[ call] add(a=1, b=2)\nDone", "an answer that only looks like a call"
    logs = {"prompt": ["1+2="], "completion": [turns], "rewards": {}, "extra": {}, "advantages": [0.5]}
    assert "| assistant: &#91;call&#93; add(a=1, b=2)<br>tool: " in completions_table(logs)


def test_the_readme_says_what_a_run_is_tracked_with(tmp_path):
    section = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split("## Tracking")[1]
    section = section.split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    scope = {"VPDConfig": lambda name, **changes: tiny.config(tmp_path / name, **changes)}
    exec(code, scope)
    assert scope["args"].report_to == ["trackio", "tensorboard", "wandb"]
    assert scope["args"].project == "vpd"
    assert f"the first {MOST_ROWS}" in section
