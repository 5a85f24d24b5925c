"""Two processes (gloo, CPU), started as a user would, train one model and never wait for each other for ever."""

import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.launching import Hangs, accelerate_command, run
from vpd_trl.feedback import contains_answer


SCRIPT = Path(__file__).parent / "distributed_script.py"


def launch(scenario, folder, processes=2, *, fails=False):
    """The results of each process; a hang is a failure."""
    folder.mkdir(exist_ok=True)
    # "multi_gpu" picks the launcher of several processes (with --cpu it would start one, or need MPI); the environment
    # says that they run on CPUs
    launcher = ["--multi_gpu", "--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no"]
    command = accelerate_command(SCRIPT, [scenario, folder], *map(str, launcher), "--dynamo_backend", "no")
    if processes == 1:
        command = [sys.executable, str(SCRIPT), scenario, str(folder)]
    try:
        status, output = run(command, seconds=240, ACCELERATE_USE_CPU="true")
    except Hangs as hang:
        pytest.fail(f"{scenario} hangs on {processes} processes.\n{hang}")
    assert (status != 0) is fails, output[-6000:]
    return [torch.load(folder / f"world{processes}_rank{i}.pt", weights_only=False) for i in range(processes)]


def assert_one_model(first, second, alone):
    """Both ranks hold the same to the bit, and what one process has."""
    assert tiny.same(first, second), "the ranks were trained apart"
    for name, weight in alone.items():
        assert torch.allclose(weight, first[name], atol=2e-6, rtol=1e-4), name


@pytest.mark.parametrize(
    ("scenario", "e_steps"), [("plain", [0, 1, 2]), pytest.param("every_other", [0, 2], marks=pytest.mark.slow)]
)
def test_two_processes_stay_one_model_and_equal_one_process(tmp_path, scenario, e_steps):
    first, second = launch(scenario, tmp_path)
    (alone,) = launch(scenario, tmp_path, processes=1)
    assert_one_model(first["weights"], second["weights"], alone["weights"])
    initial = tiny.weights(tiny.model(tiny.tokenizer()))
    assert not tiny.same(initial, alone["weights"])
    two, one = ([r for r in log if "m_step/tokens" in r] for log in (first["log"], alone["log"]))
    for rows in (two, one):
        assert [i for i, row in enumerate(rows) if "e_step/loss" in row] == e_steps
    m_step = ["loss", "grad_norm", "m_step/divergence", "m_step/tokens"]
    e_step = ["loss", "grad_norm", "reward_margin", "reward_shift", "positives", "negatives"]
    for i, (a, b) in enumerate(zip(two, one, strict=True)):
        for name in m_step + [f"e_step/{name}" for name in e_step if i in e_steps]:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (i, name)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["joint_loss", "advantage_reshaping"])
def test_two_processes_train_a_hybrid_as_one_does(tmp_path, scenario):
    first, second = launch(scenario, tmp_path)
    (alone,) = launch(scenario, tmp_path, processes=1)
    assert_one_model(first["weights"], second["weights"], alone["weights"])
    assert not tiny.same(tiny.weights(tiny.model(tiny.tokenizer())), alone["weights"])
    two, one = ([r for r in log if "reward" in r] for log in (first["log"], alone["log"]))
    for a, b in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "teacher/log_ratio_margin"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["no_feedback_on_one", "no_success_on_one", "no_success", "sampled"])
def test_ranks_stay_one_model_and_do_not_hang(tmp_path, scenario):
    first, second = launch(scenario, tmp_path)
    assert tiny.same(first["weights"], second["weights"])
    rows = [row for row in first["log"] if "m_step/tokens" in row]
    assert len(rows) == 3
    for row in rows:
        # 16 rollouts: 2 micro-batches of 4 on each of 2 processes
        successes, failures = row["e_step/positives"], row["e_step/negatives"]
        assert row["e_step/skipped"] == float(scenario == "no_success")
        if scenario == "no_feedback_on_one":
            assert row["feedback/coverage"] == 0.5
            assert successes + failures == 8
        if scenario == "no_success":
            assert (successes, failures) == (0, 16)
            assert "e_step/loss" not in row
        if scenario == "no_success_on_one":
            assert (successes, failures) == (4, 12)


@pytest.mark.slow
def test_the_average_of_the_teacher_is_the_same_on_both_ranks(tmp_path):
    first, second = launch("ema_teacher", tmp_path)
    assert tiny.same(first["weights"], second["weights"])
    assert tiny.same(first["average"], second["average"])
    assert not tiny.same(first["average"], first["weights"])
    assert not tiny.same(first["average"], tiny.weights(tiny.model(tiny.tokenizer())))


@pytest.mark.slow
def test_the_adapter_of_a_lora_teacher_is_trained_by_both_ranks_as_by_one(tmp_path):
    first, second = launch("lora_teacher", tmp_path)
    (alone,) = launch("lora_teacher", tmp_path, processes=1)
    for part in ("weights", "adapter"):
        assert_one_model(first[part], second[part], alone[part])
    assert any(weight.abs().max() > 1e-3 for name, weight in alone["adapter"].items() if "lora_B" in name)


@pytest.mark.slow
def test_a_fixed_prior_stays_the_initial_weights_on_both_ranks(tmp_path):
    first, second = launch("fixed_prior", tmp_path)
    assert tiny.same(first["weights"], second["weights"])
    initial = tiny.weights(tiny.model(tiny.tokenizer()))
    assert tiny.same(first["initial"], initial)
    assert tiny.same(second["initial"], initial)
    assert not tiny.same(first["weights"], initial)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["between_rollout_batches", "within_a_rollout_batch"])
def test_a_run_resumed_on_two_processes_is_the_same_run(tmp_path, place):
    whole = launch(f"save_{place}", tmp_path)
    within = place == "within_a_rollout_batch"
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoint-3").glob("vpd_rollouts_*"))
    assert kept == (["vpd_rollouts_0.pt", "vpd_rollouts_1.pt"] if within else [])
    resumed = launch(f"resume_{place}", tmp_path)
    for a, b in zip(whole, resumed, strict=True):
        assert a["at_start"]["rollout_batches"] == 0
        assert b["at_start"]["rollout_batches"] == (2 if within else 3)
        assert b["at_start"]["shift"] is not None
        assert b["at_start"]["rollouts_are_kept"] is within
        assert a["rollout_batches"] == b["rollout_batches"] == (3 if within else 6)
        assert a["shift"] == b["shift"]
        for weights in ("weights", "average", "initial"):
            assert tiny.same(a[weights], b[weights]), weights
    assert tiny.same(resumed[0]["weights"], resumed[1]["weights"])
    assert tiny.same(resumed[0]["average"], resumed[1]["average"])


@pytest.mark.slow
def test_a_feedback_function_that_raises_on_one_rank_stops_all_with_its_error(tmp_path):
    first, second = launch("raises_on_one", tmp_path, fails=True)
    assert "the judge is out of office" in first["error"]
    assert "Process 1 failed" in first["error"]
    assert "the judge is out of office" in second["error"]


@pytest.mark.slow
def test_a_feedback_function_that_raises_where_the_others_generate_stops_all_with_its_error(tmp_path):
    first, second = launch("raises_before_generate", tmp_path, fails=True)
    assert "Process 1 failed" in first["error"]
    assert "the judge is out of office" in first["error"]
    assert "the judge is out of office" in second["error"]


@pytest.mark.slow
def test_processes_that_generate_unequally_often_stop_and_are_told_so(tmp_path):
    for result in launch("generates_more_often_on_one", tmp_path, fails=True):
        assert "process 0 is at generate(); process 1 is at the end of its work" in result["error"]


@pytest.mark.slow
def test_a_process_without_failures_takes_part_in_self_critique_and_its_metrics_count_critiques(tmp_path):
    first, second = launch("sampled_self_critique", tmp_path)
    assert tiny.same(first["weights"], second["weights"])
    assert [len(batch) for batch in first["seen"]] == [0, 1, 1]
    assert [len(batch) for batch in second["seen"]] == [8, 8, 8]
    rows = [row for row in first["log"] if "m_step/tokens" in row]
    for row, *batches in zip(rows, first["seen"], second["seen"], strict=True):
        asked = [entry for batch in batches for entry in batch]
        kept = [(gold, text) for gold, text, finished in asked if finished and text.strip()]
        assert 0 < len(kept) < len(asked), "both cases are met"
        assert row["feedback/critique_discarded"] == pytest.approx(1 - len(kept) / len(asked))
        leaks = sum(contains_answer(text, gold) for gold, text in kept)
        assert row["feedback/answer_leak_rate"] == pytest.approx(leaks / len(kept))


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
    assert {t for t, _ in second["seen"][:4]} <= set(others)
