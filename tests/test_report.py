"""`vpd-trl report`: what is read from runs, and what the page says of them."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from vpd_trl.cli import main
from vpd_trl.cli.errors import UsageError
from vpd_trl.cli.guide import arrange
from vpd_trl.cli.plots import metric_svg, running_mean
from vpd_trl.cli.runs import Run, load, summarize


def write_run(folder, rows, *, step=None, arguments=None):
    folder.mkdir(parents=True, exist_ok=True)
    last = max((row["step"] for row in rows), default=0) if step is None else step
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": last, "log_history": rows}))
    if arguments is not None:
        (folder / "arguments.json").write_text(json.dumps(arguments))
    return folder


def write_evaluation(folder, **metrics):
    folder.mkdir(parents=True, exist_ok=True)
    entries = {name: dict(zip(("value", "low", "high"), values, strict=True)) for name, values in metrics.items()}
    (folder / "summary.json").write_text(json.dumps({"name": "sums", "problems": 6, "metrics": entries}))
    return folder


def rewards(*values):
    return [{"step": i, "epoch": i / 10, "reward": value} for i, value in enumerate(values, start=1)]


def test_a_run_holds_the_finite_metrics_of_its_log_by_step(tmp_path):
    rows = [*rewards(0.25, float("nan"), None, 0.5), {"step": 4, "epoch": 0.4, "eval_avg@4": 0.75}]
    rows += [{"step": 4, "train_runtime": 3.0, "train_loss": 0.5}, {"step": 4, "reward": True, "note": "x"}]
    (run,), measurements = load([str(write_run(tmp_path / "run", rows))])
    assert run.series == {"reward": [(1, 0.25), (4, 0.5)], "eval_avg@4": [(4, 0.75)]}
    assert (run.label, run.last_step, measurements) == ("run", 4, [])


def test_the_state_that_got_farthest_is_read_from_a_folder_of_checkpoints(tmp_path):
    for step in (9, 10):
        write_run(tmp_path / f"checkpoint-{step}", rewards(*[0.5] * step))
    (run,), _ = load([str(tmp_path)])
    assert run.last_step == len(run.series["reward"]) == 10
    write_run(tmp_path, [*rewards(*[0.5] * 10), {"step": 10, "eval_avg@4": 1.0}])
    (run,), _ = load([str(tmp_path)])
    assert run.series["eval_avg@4"] == [(10, 1.0)]


def test_evaluations_within_training_bring_intervals_and_those_of_an_earlier_run_are_left_out(tmp_path):
    write_run(tmp_path, rewards(0.1, 0.2))
    write_evaluation(tmp_path / "evaluation" / "step-2", **{"avg@4": (0.5, 0.25, 0.75)})
    write_evaluation(tmp_path / "evaluation" / "step-2" / "hard", **{"avg@4": (0.25, None, None)})
    write_evaluation(tmp_path / "evaluation" / "step-300", **{"avg@4": (1.0, 1.0, 1.0)})
    (run,), _ = load([str(tmp_path)])
    assert run.series["eval_avg@4"] == [(2, 0.5)]
    assert run.series["eval_hard_avg@4"] == [(2, 0.25)]
    assert run.intervals == {"eval_avg@4": {2: (0.25, 0.75)}}


def test_labels_are_as_much_of_the_paths_as_tells_them_apart_or_what_was_asked_for(tmp_path):
    paths = [write_run(tmp_path / place / "run", rewards(1.0)) for place in ("a", "b")]
    paths.append(write_run(tmp_path / "other", rewards(1.0)))
    runs, _ = load([*map(str, paths), f"mine={paths[2]}"])
    assert [run.label for run in runs] == ["a/run", "b/run", "other", "mine"]


def test_best_is_the_highest_reward_the_lowest_divergence_and_nothing_where_no_way_is_better():
    points = [(1, 0.5), (2, 0.125), (3, 0.25)]
    assert summarize("reward", points).best_step == 1
    divergence, shift = summarize("m_step/divergence", points), summarize("e_step/reward_shift", points)
    assert (divergence.first, divergence.last, divergence.best, divergence.best_step) == (0.5, 0.25, 0.125, 2)
    assert (shift.best, shift.best_step) == (None, None)


def test_metrics_are_grouped_in_the_order_of_what_to_watch_and_none_is_lost():
    metrics = {"time/e_step", "mine", "e_step/loss", "reward", "eval_avg@4", "m_step/tokens", "m_step/divergence"}
    metrics |= {"feedback/coverage", "teacher/new", "rewards/f/mean", "completions/mean_length"}
    groups = arrange(metrics)
    order = ["reward", "success", "m_step", "e_step", "teacher", "feedback", "completions", "time", "other"]
    assert [group.key for group, _ in groups] == order
    assert groups[2][1] == ["m_step/divergence", "m_step/tokens"]
    assert sorted(name for _, names in groups for name in names) == sorted(metrics)


def test_a_running_mean_takes_what_there_is_at_the_ends():
    assert running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.0]


def test_the_page_stands_alone_and_names_of_runs_are_text_in_it(tmp_path, capsys):
    a = write_run(tmp_path / "<img src=x>&", rewards(0.0, 0.5), arguments={"task": "sums", "method": "vpd", "seed": 1})
    b = write_run(tmp_path / "$b_{", [{"step": 1, "m_step/divergence": 0.5}], arguments={"method": "sdpo", "seed": 2})
    c = write_evaluation(tmp_path / "c", **{"avg@4": (0.5, 0.25, 0.75), "pass@4": (1.0, None, None)})
    output = tmp_path / "report"
    assert main(["report", str(a), str(b), f"_under={a}", str(c), "--output", str(output), "--title", "<T>"]) == 0
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "&lt;img src=x&gt;&amp;" in page
    assert "<title>&lt;T&gt;</title>" in page
    links = set(re.findall(r'(?:href|src)="([^"]*)"', page)) | set(re.findall(r"url\(([^)]*)\)", page))
    assert {link for link in links if not link.startswith("#")} == set()
    assert "<script" not in page
    assert "@import" not in page
    assert page.count("<svg") == 2 + 2  # a metric each, and the two of the evaluation
    assert "var(--series-0)" in page
    assert "1 more argument differs" in page
    files = {path.name for path in output.iterdir()}
    assert files == {"index.html", "metrics.csv", "reward.png", "m_step.png", "evaluations.png"}
    assert (output / "reward.png").read_bytes().startswith(b"\x89PNG")
    with (output / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines[0] == {
        "run": "<img src=x>&", "metric": "reward", "first": "0.0", "last": "0.5", "best": "0.5", "best_step": "2",
        "values": "2",
    }  # fmt: skip
    assert str(output / "index.html") in capsys.readouterr().out


def test_a_long_run_is_thinned_out_on_the_page():
    noise = np.random.default_rng(0).random(20_000)
    short, long = (Run("run", Path("run"), {"reward": list(enumerate(noise[:n]))}) for n in (300, 20_000))
    assert len(metric_svg("reward", [long])) < 2 * len(metric_svg("reward", [short]))


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_a_folder_without_a_run_is_a_usage_error_of_one_line(tmp_path, capsys, kind):
    folder = tmp_path / "run"
    if kind != "missing":
        folder.mkdir()
    if kind == "broken":
        (folder / "trainer_state.json").write_text("{")
    assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vpd-trl: error: ")
    assert str(folder) in error
    assert error.count("\n") == 1
    with pytest.raises(UsageError):
        load([str(folder)])


def test_without_matplotlib_the_extra_to_install_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(write_run(tmp_path / "run", rewards(1.0)))]) == 2
    assert "pip install 'vpd-trl[report]'" in capsys.readouterr().err
