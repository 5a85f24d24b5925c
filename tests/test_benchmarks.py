"""The benchmarks: their tables come from their results, and what they count can't grow unseen."""

import json
import re

import pytest
import torch

from examples.benchmarks import eight_billion, gpu, measures, report, run
from tests import heads
from vpd_trl.distillation import Comparison, distill


def test_the_readmes_table_of_ratios_comes_from_the_results_files():
    text = report.README.read_text(encoding="utf-8")
    table = report.table()
    assert text.split(f"{report.BEGIN}\n")[1].split(f"\n{report.END}")[0] == table
    assert table.startswith("| measured |")
    assert all(line.count(" | ") == 4 for line in table.splitlines()[2:])
    page = (report.HERE / "README.md").read_text(encoding="utf-8")
    assert page.split("<!-- phases -->\n")[1].split("\n<!-- /phases -->")[0] == report.phases()
    assert report.phases().count("\n") == 7


def test_the_page_about_eight_billion_parameters_comes_from_its_results_file():
    found = json.loads(eight_billion.RESULT.read_text())
    text = eight_billion.PAGE.read_text(encoding="utf-8")
    assert text.split("<!-- estimate -->\n")[1].split("\n<!-- /estimate -->")[0] == eight_billion.tables(found)


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_results_file_says_how_it_was_made(path):
    found = json.loads(path.read_text())
    assert found["command"] == f"python -m examples.benchmarks.run {path.stem}"
    assert path.stem in run.MEASURED
    assert re.fullmatch(r"[0-9a-f]{7,}\+?", found["commit"])
    assert {"torch", "transformers", "trl"} <= found["versions"].keys()


SMALL = {"steps": 1, "longest": 100, "hidden": 64, "layers": 2}


def test_one_step_of_sdpo_takes_fewer_operations_and_pads_less_than_trls():
    paper = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 32}  # rows as in the recipes
    ours, theirs = (measures.work(kind, **SMALL, **paper) for kind in ("sdpo", "trl sdpo"))
    assert ours["real"] >= 0.95 > theirs["real"]
    assert ours["flops"] <= 0.8 * theirs["flops"]
    half = measures.work("sdpo", **SMALL, coverage=0.5, **paper)
    assert half["flops"] < 0.6 * ours["flops"]


def test_an_e_step_takes_the_operations_that_the_page_adds_up():
    sdpo = measures.work("sdpo", **SMALL)
    every = measures.work("vpd", **SMALL, e_step_frequency=1)
    # 5 more passes of the layers beside 4, and 6 of the head beside 4, the teacher's ones longer
    assert 1.4 < (every["flops"] - sdpo["flops"]) / sdpo["flops"] < 1.5
    # 3 more with the options that save two
    cheap = measures.work("vpd", **SMALL, e_step_frequency=1, cheap=True)
    assert 0.8 < (cheap["flops"] - sdpo["flops"]) / sdpo["flops"] < 0.95


def test_a_second_of_sleep_for_each_rollout_is_about_a_second_for_a_batch():
    found = measures.waiting("vpd", each=0.1, steps=1)
    assert 0.1 <= found["feedback"] < 3.2, "64 of them in turn take 6.4"


@pytest.mark.parametrize("fused", [True, False])
def test_the_measurement_for_gpus_runs_on_a_cpu(fused):
    found = gpu.measure(gpu.TINY, length=16, rollouts=8, rows=4, fused=fused, steps=1)
    for part in found.values():
        assert all(part[name] > 0 for name in ("seconds", "tokens a second", "operations a second"))
    assert gpu.matrix_peak(64, repeats=2) > 0


def test_full_logits_give_what_the_fused_divergence_gives():
    student, teacher, s, t = heads.setting(7, 101, temperature=0.5)
    tokens, weights = torch.arange(7), torch.linspace(0.5, 2.0, 7)
    inputs = (student, teacher, s, t, tokens, Comparison(0.5))
    ours, full = distill(*inputs, weights=weights), gpu.with_full_logits(*inputs, weights=weights)
    heads.agree(full.loss, ours.loss, [student, s.weight, s.bias])
    for a, b in zip(full[1:], ours[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
