"""The tables of the paper in miniature are what its runs say."""

import json
import math
import re
from dataclasses import replace

import pytest

from examples.paper_in_miniature import experiments, finished, grid, report
from examples.paper_in_miniature.run import Cell
from examples.paper_in_miniature.statistics import Estimate, average, estimate
from examples.paper_in_miniature.task import DOMAINS


def test_an_interval_is_students():
    # Mean 3, variance 2.5, standard error sqrt(0.5), t(4) = 2.776
    got = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (got.mean, got.runs) == (3.0, 5)
    assert got.half == pytest.approx(2.7764 * math.sqrt(0.5), rel=1e-4)


def test_the_difference_between_domains_widens_no_average():
    same, apart = average([[0.1, 0.2, 0.3]] * 2), average([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]])
    assert same.half == pytest.approx(apart.half)
    assert apart.mean == pytest.approx(0.5)
    # Two groups of variance 0.01: standard error sqrt(2 · 0.01 / 3) / 2, with 4 degrees of freedom
    assert same.half == pytest.approx(2.7764 * math.sqrt(2 * 0.01 / 3) / 2, rel=1e-4)


def test_a_single_run_has_no_interval():
    assert str(estimate([0.25])) == "25.0"
    assert str(estimate([0.25, 0.25])) == "25.0 ± 0.0"
    assert math.isnan(estimate([]).mean)


TUNED = {experiments.tuning_name(system, feedback): 0 for feedback, system in experiments.TUNED_SYSTEMS}


def test_every_system_is_tuned_with_the_same_budget_and_never_on_reported_seeds():
    candidates: dict[tuple[str, str], list] = {}
    for system in experiments.SYSTEMS:
        candidates.setdefault((system.method, system.teacher), []).extend(system.candidates)
    assert {len(found) for found in candidates.values()} == {5}
    assert all(len(set(found)) == 5 for found in candidates.values())
    tried = {c.seed for c in grid.first_trials()} | set(grid.TUNING_SEEDS)
    reported = {c.seed for experiment in experiments.EXPERIMENTS.values() for c in experiment(TUNED)}
    assert tried.isdisjoint(reported)


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_cell_of_an_experiment_has_at_least_five_seeds(name):
    seeds: dict[Cell, set[int]] = {}
    for c in experiments.EXPERIMENTS[name](TUNED):
        seeds.setdefault(replace(c, seed=0), set()).add(c.seed)
    assert min(map(len, seeds.values())) >= 5


def test_a_run_is_known_by_what_it_is():
    one, other = Cell(seed=1), Cell(seed=1, overrides=(("e_step_frequency", 1),))
    assert finished.key(one) == json.dumps({"seed": 1})
    assert finished.key(one) != finished.key(other)
    assert finished.key(other) == json.dumps(finished.described(other), sort_keys=True)


def runs_of(accuracies):
    """Runs of two systems, by label, domain and seed."""
    cells = {"A": {}, "B": {}}
    runs = {}
    for (label, domain, seed), accuracy in accuracies.items():
        c = Cell(method="sdpo" if label == "A" else "vpd", domain=domain, seed=seed)
        cells[label][c] = None
        runs[finished.key(c)] = {
            "after": {"held_out": accuracy},
            "before": {"held_out": 0.01},
            "curve": [[60, 0.5]],
            "commit": "abc",
        }
    return [report.Row(label, list(found)) for label, found in cells.items()], runs


def test_differences_are_taken_run_by_run():
    accuracies = {}
    for domain in DOMAINS:
        for seed, level in enumerate((0.1, 0.5, 0.9)):
            accuracies["A", domain, seed] = level
            accuracies["B", domain, seed] = level + 0.05
    rows, runs = runs_of(accuracies)
    summary = report.Table("x", "", rows, [("B", "A")]).summary(runs)
    assert summary["differences"]["B − A"]["mean"] == pytest.approx(0.05)
    assert summary["differences"]["B − A"]["half"] == pytest.approx(0.0, abs=1e-9)
    assert summary["rows"]["A"]["average"]["half"] > 0.1
    assert summary["collapsed"] == {"A": 4, "B": 4}  # of each domain the run that ended below half of 0.5
    assert summary["rows"]["Base model"]["average"]["mean"] == pytest.approx(0.01)
    assert (summary["seeds"], summary["commits"]) == ([0, 1, 2], ["abc"])


def test_a_course_knows_when_rewards_fell_for_good_and_when_the_warning_came():
    def course(rewards, ends, clipped=(0.0,) * 5):
        history = {"step": [5, 10, 15, 20, 25], "reward": rewards, "teacher/log_ratio_end": ends}
        return finished.course({"history": history | {"completions/clipped_ratio": list(clipped)}})

    ends = [None, -0.001, -0.02, 0.0, -1.0]
    assert course([0.0, 0.1, 0.5, 0.4, 0.1], ends) == finished.Course(fall=20, warning=15)
    assert course([0.0, 0.5, 0.1, 0.4, 0.5], [0.0] * 4 + [-0.02]) == finished.Course(fall=None, warning=25)
    assert course([0.0, 0.09, 0.0, 0.0, 0.0], [0.0] * 5) == finished.Course(None, None)


def test_missing_runs_are_left_out_and_counted():
    rows, runs = runs_of({("A", "cipher", 0): 0.2, ("A", "cipher", 1): 0.4, ("B", "cipher", 1): 0.5})
    del runs[finished.key(rows[0].cells[1])]
    summary = report.Table("x", "", rows, [("B", "A")]).summary(runs)
    assert summary["rows"]["A"]["cipher"]["runs"] == 1
    assert summary["differences"]["B − A"]["runs"] == 0
    assert "B − A" not in report.markdown(summary)


with_results = pytest.mark.skipif(not grid.TUNED.exists(), reason="no results yet")


@with_results
def test_the_tables_are_those_of_the_runs():
    runs, page = finished.load(), report.PAGE.read_text()
    for table in report.tables(grid.read_tuned()):
        summary = json.loads(json.dumps(table.summary(runs)))
        assert summary == json.loads((finished.RESULTS / f"{table.name}.json").read_text()), table.name
        shown = re.search(rf"<!-- {table.name} -->\n(.*?)\n?<!-- /{table.name} -->", page, re.DOTALL)[1]
        assert shown == report.markdown(summary)


@with_results
def test_the_front_pages_table_has_the_averages_of_tables_1_and_2():
    shown = re.search(
        r"<!-- miniature-table -->\n(.*?)\n<!-- /miniature-table -->", report.FRONT_PAGE.read_text(), re.DOTALL
    )
    rows = [line.strip("| ").split(" | ") for line in shown[1].splitlines()[2:]]
    assert len(rows) == 1 + len(experiments.SYSTEMS)
    for label, *cells in rows:
        for cell, name in zip(cells, ("table_1", "table_2"), strict=True):
            table = json.loads((finished.RESULTS / f"{name}.json").read_text())
            assert cell == str(Estimate(**table["rows"][label]["average"]))


@with_results
def test_the_page_shows_a_picture_where_there_is_one_and_no_other():
    shown = set(re.findall(r"\(results/(\w+)\.png\)", report.PAGE.read_text()))
    assert shown == {file.stem for file in finished.RESULTS.glob("*.png")}


@with_results
def test_the_choice_of_each_system_is_the_better_one_of_its_two_best_candidates():
    tuned, count = json.loads(grid.TUNED.read_text()), len(grid.TUNING_DOMAINS)
    for name, candidates in tuned["candidates"].items():
        reached = [c["accuracies"] for c in candidates]
        first = sorted((sum(a[:count]) for a in reached), reverse=True)
        full = [a for a in reached if len(a) == count * len(grid.TUNING_SEEDS)]
        chosen = reached[tuned["chosen"][name]]
        if len(reached) > 1:
            assert sum(chosen) == max(map(sum, full)), name
            assert sum(chosen[:count]) >= first[1], name


@with_results
@pytest.mark.slow
def test_a_cell_run_again_is_within_its_interval():
    from examples.paper_in_miniature.run import run

    cells = list(experiments.rows_of(experiments.VPD, "siblings", grid.read_tuned(), ("cipher",)))
    runs = finished.load()
    kept = [finished.held_out(runs[finished.key(c)]) for c in cells]
    again = [run(c)["after"]["held_out"] for c in cells[:2]]
    assert abs(sum(again) / 2 - sum(kept[:2]) / 2) <= max(estimate(kept).half, 0.02)
