"""Avg@k, pass@k and majority@k are what they are called, and an evaluation survives being stopped."""

import asyncio
import itertools
import json
import math
import os
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats

from vpd_trl.evaluation import AvgAtK, Evaluation, MajorityAtK, PassAtK, Sample, Sampling
from vpd_trl.evaluation.estimators import avg_at_k, bootstrap_intervals, majority_at_k, pass_at_k


class Digits:
    """An engine whose samples are digits that depend on the seed alone, and that notes what it was asked for."""

    collective = False

    def __init__(self, batch_size=8, name="digits", fails_at=None):
        self.batch_size, self.name, self.fails_at = batch_size, name, fails_at
        self.asked = []

    def describe(self):
        return {"engine": "fake", "model": self.name}

    def generate(self, prompts, *, k, sampling, seeds):
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append(list(prompts))
        draws = [random.Random(seed).choices("0123456789", k=k) for seed in seeds]
        return [[Sample(f"= {d}", [ord(d)], d != "0") for d in row] for row in draws]

    @property
    def prompts(self):
        return [prompt for prompts in self.asked for prompt in prompts]


def is_small(completions, limit, **kwargs):
    return [float(int(text[-1]) < n) for text, n in zip(completions, limit, strict=True)]


def last_digit(text):
    return text[-1]


def problems(n=10):
    return Dataset.from_dict(
        {"prompt": [f"digit {i}" * (i + 1) for i in range(n)], "limit": [i % 10 for i in range(n)]}
    )


def evaluation(data=None, reward=is_small, **changes):
    return Evaluation(problems() if data is None else data, reward, **{"k": 4, "answer_fn": last_digit, **changes})


def lines(folder):
    return [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]


# ---- Estimators


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_success(n):
    for successes in itertools.product([0, 1], repeat=n):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(successes, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k([successes], k)[0] == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_exact_where_the_binomials_are_too_large_for_floats():
    n, c = 3000, 3
    successes = np.zeros((1, n))
    successes[0, :c] = 1
    for k in (1, 7, 1500, 2997, 2998):
        exact = 1 - math.comb(n - c, k) / math.comb(n, k) if k <= n - c else 1.0
        assert pass_at_k(successes, k)[0] == pytest.approx(exact, rel=1e-9)


def test_pass_at_k_of_few_samples_estimates_the_chance_of_k_new_ones_without_bias():
    rng = np.random.default_rng(0)
    successes = rng.random((200_000, 4)) < 0.3
    assert pass_at_k(successes, 3).mean() == pytest.approx(1 - 0.7**3, abs=0.004)
    assert abs((1 - (1 - successes.mean(axis=1)) ** 3).mean() - (1 - 0.7**3)) > 0.02, "the naive estimate is biased"


def test_avg_at_k_takes_partial_scores_of_the_first_k_samples():
    scores = [[0.5, 1.0, 0.0, 0.0], [0.25, 0.25, 1.0, 1.0]]
    assert avg_at_k(scores).tolist() == [0.375, 0.625]
    assert avg_at_k(scores, 2).tolist() == [0.75, 0.25]


def test_majority_at_k_is_the_vote_counted_by_hand():
    for answers in itertools.product(["a", "b", None, " "], repeat=4):
        successes = [answer == "a" for answer in answers]
        for k in range(1, 5):
            a, b = answers[:k].count("a"), answers[:k].count("b")
            first = next((answer for answer in answers[:k] if answer in ("a", "b")), None)
            wins = a > b or (a == b > 0 and first == "a")
            assert majority_at_k([answers], [successes], k)[0] == float(wins), (answers, k)


def test_the_winner_of_a_vote_is_right_if_the_first_sample_that_gave_it_is():
    assert majority_at_k([["7", "8", "7"]], [[1, 0, 0]])[0] == 1
    assert majority_at_k([["7", "8", "7"]], [[0, 0, 1]])[0] == 0


@pytest.mark.parametrize("k", [0, 5, 1.5, -1])
def test_a_k_that_the_samples_do_not_allow_is_refused_with_the_numbers(k):
    for call in (lambda: pass_at_k([[1, 0, 1, 0]], k), lambda: avg_at_k([[1, 0, 1, 0]], k)):
        with pytest.raises(ValueError, match=rf"from 1 to the number of samples per problem \(4\); got {k}"):
            call()


def test_input_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="problem 1 has 1 and problem 0 has 2"):
        avg_at_k([[1, 0], [1]])
    with pytest.raises(ValueError, match="no samples"):
        avg_at_k([])
    with pytest.raises(ValueError, match="no samples"):
        pass_at_k([[], []], 1)
    with pytest.raises(ValueError, match="one list of numbers per problem"):
        avg_at_k([1.0, 0.0])
    with pytest.raises(ValueError, match="Sample 1 of problem 0 has the value nan"):
        avg_at_k([[1, math.nan]])
    with pytest.raises(ValueError, match="must be 0 or 1"):
        pass_at_k([[0.5, 1]], 1)
    with pytest.raises(ValueError, match="1 problems with 2 samples each; got 1 problems with \\[3\\]"):
        majority_at_k([["a", "b", "c"]], [[1, 0]])
    with pytest.raises(TypeError, match="a string or None; got int"):
        majority_at_k([[1, 2]], [[1, 0]])


# ---- Intervals


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for i in range(300):
        values = rng.random((60, 1)) ** 2
        ((low, high),) = bootstrap_intervals(values, resamples=500, confidence=0.9, seed=i)
        hits += low <= 1 / 3 <= high
    assert 0.84 < hits / 300 < 0.95


def test_an_interval_is_what_scipy_finds_and_the_same_each_time():
    values = np.random.default_rng(1).random((40, 2))
    ours = bootstrap_intervals(values, seed=3)
    assert ours == bootstrap_intervals(values, seed=3)
    assert ours != bootstrap_intervals(values, seed=4)
    for column, (low, high) in zip(values.T, ours, strict=True):
        theirs = stats.bootstrap((column,), np.mean, method="percentile", rng=0).confidence_interval
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
        assert low < column.mean() < high


def test_metrics_share_the_problems_that_are_drawn():
    values = np.random.default_rng(1).random(40)
    same, shifted = bootstrap_intervals(np.stack([values, values + 1], axis=1), resamples=700)
    assert shifted == pytest.approx((same[0] + 1, same[1] + 1))


def test_one_problem_has_no_interval():
    assert bootstrap_intervals([[0.5, 1.0]]) == [None, None]


# ---- Metrics of Evaluate


SCORES = [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0.5, 0, 0]]
ANSWERS = [["3", "4", "4", None], ["7", "7", None, "8"], [None] * 4]


def test_the_metrics_compute_what_the_estimators_do():
    successes = np.array(SCORES) >= 1
    assert AvgAtK().compute(scores=SCORES) == {"avg@4": avg_at_k(SCORES).mean()}
    assert AvgAtK().compute(scores=np.array(SCORES), k=2) == {"avg@2": avg_at_k(SCORES, 2).mean()}
    expected = {f"pass@{k}": pass_at_k(successes, k).mean() for k in (1, 2)}
    assert PassAtK().compute(scores=SCORES, k=[1, 2]) == expected
    assert PassAtK().compute(scores=SCORES, k=4, threshold=0.5) == {"pass@4": 1.0}
    assert MajorityAtK().compute(scores=SCORES, answers=ANSWERS) == {"majority@4": 1 / 3}
    assert PassAtK().compute(scores=SCORES, k=np.int64(1)) == PassAtK().compute(scores=SCORES, k=1)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_majority_at_k_takes_problems_without_any_answer_wherever_they_stand(one_by_one):
    answers, scores = [[None, None], ["7", "7"]], [[0, 0], [1, 1]]
    for order in (1, -1):
        metric = MajorityAtK()
        if one_by_one:
            for entry in list(zip(answers, scores, strict=True))[::order]:
                metric.add(answers=entry[0], scores=entry[1])
        else:
            metric.add_batch(answers=answers[::order], scores=scores[::order])
        assert metric.compute() == {"majority@2": 0.5}


def test_the_metrics_gather_batches_and_combine():
    import evaluate

    metric = AvgAtK()
    metric.add_batch(scores=SCORES[:2])
    metric.add_batch(scores=SCORES[2:])
    assert metric.compute() == AvgAtK().compute(scores=SCORES)
    both = evaluate.combine([AvgAtK(), PassAtK(), MajorityAtK()]).compute(scores=SCORES, answers=ANSWERS, k=2)
    assert both == {"avg@2": 1.75 / 3, "pass@2": 0.5, "majority@2": 2 / 3}


def test_the_metrics_refuse_what_the_estimators_refuse():
    with pytest.raises(ValueError, match="problem 1 has 1 and problem 0 has 2"):
        AvgAtK().compute(scores=[[1, 0], [1]])
    with pytest.raises(ValueError, match="got 5"):
        PassAtK().compute(scores=SCORES, k=5)
    with pytest.raises(ValueError, match="k is an empty list"):
        PassAtK().compute(scores=SCORES, k=[])
    with pytest.raises(ValueError, match="no samples"):
        AvgAtK().compute(scores=[])


def test_the_metrics_need_neither_network_nor_a_home_that_can_be_written():
    script = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import sys, vpd_trl.evaluation\n"
        "assert 'evaluate' not in sys.modules, 'imported before it was needed'\n"
        "from vpd_trl.evaluation import AvgAtK, PassAtK, MajorityAtK\n"
        "print(AvgAtK().compute(scores=[[1, 0]]), PassAtK().compute(scores=[[1, 0]], k=1),\n"
        "      MajorityAtK().compute(scores=[[1, 0]], answers=[['a', None]]))\n"
    )
    nowhere = os.path.join(os.devnull, "home")
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "XDG_CACHE_HOME")}
    env |= {"HOME": nowhere, "HF_HOME": nowhere, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "{'avg@2': 0.5} {'pass@1': 0.5} {'majority@2': 1.0}" in run.stdout


def test_without_the_package_evaluate_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "vpd_trl.evaluation.metrics", raising=False)
    import vpd_trl.evaluation

    monkeypatch.delattr(vpd_trl.evaluation, "metrics", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vpd-trl\[tasks\]'"):
        vpd_trl.evaluation.AvgAtK  # noqa: B018
    with pytest.raises(AttributeError, match="nothing_like_it"):
        vpd_trl.evaluation.nothing_like_it  # noqa: B018


# ---- An evaluation


def test_metrics_are_those_of_the_samples(tmp_path):
    result = evaluation(success_threshold=1.0).run(Digits(), tmp_path, progress=False)
    scores = [problem.scores for problem in result.problems]
    answers = [problem.answers for problem in result.problems]
    expected = {
        "avg@4": np.mean(scores),
        "pass@1": np.mean(scores),
        "pass@2": pass_at_k(scores, 2).mean(),
        "pass@4": pass_at_k(scores, 4).mean(),
        "majority@4": majority_at_k(answers, scores).mean(),
    }
    assert result.metrics == pytest.approx(expected)
    assert 0 < result.metrics["avg@4"] < result.metrics["pass@4"] < 1
    for name, value in result.metrics.items():
        low, high = result.intervals[name]
        assert low < value < high
    assert [problem.index for problem in result.problems] == list(range(10))
    for problem, row in zip(result.problems, problems(), strict=True):
        assert (problem.prompt, problem.columns) == (row["prompt"], {"limit": row["limit"]})
        assert problem.scores == [float(int(a) < row["limit"]) for a in problem.answers]
        assert problem.finished == [a != "0" for a in problem.answers]
    unfinished = sum(answer == "0" for row in answers for answer in row)
    assert result.truncated == pytest.approx(unfinished / 40)
    assert unfinished > 0


def test_everything_is_in_the_files(tmp_path):
    result = evaluation().run(Digits(), tmp_path, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["problems.jsonl", "settings.json", "summary.json"]
    written = sorted(lines(tmp_path), key=lambda line: line["index"])
    assert [line["completions"] for line in written] == [problem.completions for problem in result.problems]
    assert set(written[0]) == {
        *("index", "prompt", "completions", "scores", "answers", "finished", "tokens", "columns"),
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"]["avg@4"] == {
        "value": result.metrics["avg@4"],
        "low": result.intervals["avg@4"][0],
        "high": result.intervals["avg@4"][1],
    }
    assert summary["problems"] == 10
    assert summary["samples"] == 40
    assert summary["settings"]["sampling"]["temperature"] == 0.6
    assert summary["settings"]["model"] == {"engine": "fake", "model": "digits"}
    assert {"vpd_trl", "torch", "transformers"} <= summary["versions"].keys()
    assert summary["settings"] == json.loads((tmp_path / "settings.json").read_text())
    assert str(result).splitlines()[1].split()[:2] == ["avg@4", f"{result.metrics['avg@4']:.3f}"]


def test_the_protocol_is_the_paper_s_unless_told_otherwise():
    sampling = Sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.95, 0)
    assert sampling.chat_template_kwargs == {"enable_thinking": False}
    plain = Evaluation(problems(), is_small)
    assert plain.k == 16
    assert plain.metric_names == ["avg@16", "pass@1", "pass@2", "pass@4", "pass@8", "pass@16"]
    assert evaluation(k=6, pass_at=[3]).metric_names == ["avg@6", "pass@3", "majority@6"]
    assert Evaluation(problems(), is_small, k=6).pass_at == [1, 2, 4, 6]


def test_results_depend_neither_on_the_batch_size_nor_on_the_run():
    runs = [evaluation().run(Digits(batch_size=size), progress=False) for size in (1, 8, 8, 100)]
    assert all(run.problems == runs[0].problems and run.intervals == runs[0].intervals for run in runs)
    other = evaluation(sampling=Sampling(seed=1)).run(Digits(), progress=False)
    assert other.problems != runs[0].problems


def test_no_problem_is_sampled_twice_after_an_interruption(tmp_path):
    whole = evaluation().run(Digits(), progress=False)
    with pytest.raises(KeyboardInterrupt):
        evaluation().run(Digits(fails_at=2), tmp_path, progress=False)
    before = lines(tmp_path)
    assert len(before) == 4, "two portions of two problems"
    assert not (tmp_path / "summary.json").exists()
    engine = Digits()
    resumed = evaluation().run(engine, tmp_path, progress=False)
    assert len(engine.prompts) == 6
    assert not {line["prompt"] for line in before} & set(engine.prompts)
    assert resumed.problems == whole.problems
    assert resumed.metrics == whole.metrics
    assert resumed.intervals == whole.intervals
    assert len(lines(tmp_path)) == 10
    again = Digits()
    assert evaluation().run(again, tmp_path, progress=False).metrics == whole.metrics
    assert again.asked == [], "all of them are finished"


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_written_in_part_is_sampled_again(tmp_path, cut):
    whole = evaluation().run(Digits(), tmp_path, progress=False)
    path = tmp_path / "problems.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    engine = Digits()
    resumed = evaluation().run(engine, tmp_path, progress=False)
    assert len(engine.prompts) == 1
    assert resumed.problems == whole.problems
    assert path.read_bytes() == content


def test_a_line_in_between_that_is_no_result_is_refused(tmp_path):
    evaluation().run(Digits(), tmp_path, progress=False)
    path = tmp_path / "problems.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"Line 1 of .*problems.jsonl is not a result"):
        evaluation().run(Digits(), tmp_path, progress=False)


def stingy(completions, **kwargs):
    return [0.0] * len(completions)


class Strict:
    __name__ = "strict"

    def __init__(self, strict):
        self.strict = strict

    def __call__(self, completions, **kwargs):
        return [float(self.strict)] * len(completions)


def test_results_of_a_reward_with_other_options_are_refused_though_its_name_is_the_same(tmp_path):
    evaluation(reward=Strict(True)).run(Digits(), tmp_path / "object", progress=False)
    with pytest.raises(
        ValueError, match=r'reward_options is \[\{"strict": true\}\] there and \[\{"strict": false\}\]'
    ):
        evaluation(reward=Strict(False)).run(Digits(), tmp_path / "object", progress=False)
    evaluation(reward=partial(is_small, mode="a")).run(Digits(), tmp_path / "partial", progress=False)
    with pytest.raises(ValueError, match="reward_options"):
        evaluation(reward=partial(is_small, mode="b")).run(Digits(), tmp_path / "partial", progress=False)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"k": 2}, "k is 4 there and 2 here"),
        ({"sampling": Sampling(temperature=1.0)}, "sampling.temperature is 0.6 there and 1.0 here"),
        (
            {"sampling": Sampling(seed=1, top_k=5)},
            "sampling.seed is 0 there and 1 here; sampling.top_k is 0 there and 5",
        ),
        ({"sampling": Sampling(chat_template_kwargs={})}, "enable_thinking is false there and null here"),
        ({"data": problems(9)}, "dataset.problems is 10 there and 9 here"),
        ({"data": problems().map(lambda row: {"limit": 3})}, "dataset.digest"),
        ({"reward": stingy}, 'reward_funcs is ["is_small"] there and ["stingy"] here'),
        ({"reward_weights": [0.5]}, "reward_weights is [1.0] there and [0.5] here"),
        ({"success_threshold": 0.5}, "success_threshold is 1.0 there and 0.5 here"),
        ({"answer_fn": None}, 'answer_fn is "last_digit" there and null here'),
    ],
    ids=lambda value: str(value).split(" at 0x")[0][:40],  # the same in every process
)
def test_results_of_other_settings_are_refused_and_the_error_says_what_differs(tmp_path, changes, differs):
    evaluation().run(Digits(), tmp_path, progress=False)
    before = (tmp_path / "problems.jsonl").read_bytes()
    with pytest.raises(ValueError, match="results of other settings") as caught:
        evaluation(**changes).run(Digits(), tmp_path, progress=False)
    assert differs in str(caught.value)
    assert (tmp_path / "problems.jsonl").read_bytes() == before


def test_results_of_another_model_are_refused_or_overwritten(tmp_path):
    evaluation().run(Digits(), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r'model\.model is "digits" there and "other" here'):
        evaluation().run(Digits(name="other"), tmp_path, progress=False)
    engine = Digits(name="other")
    evaluation().run(engine, tmp_path, resume=False, progress=False)
    assert len(engine.prompts) == len(lines(tmp_path)) == 10


def test_what_does_not_change_the_samples_can_change_on_resuming(tmp_path):
    evaluation().run(Digits(), tmp_path, progress=False)
    engine = Digits()
    result = evaluation(pass_at=[3], confidence=0.5, resamples=100, name="other").run(engine, tmp_path, progress=False)
    assert engine.asked == []
    assert list(result.metrics) == ["avg@4", "pass@3", "majority@4"]


def test_results_whose_settings_are_lost_are_refused(tmp_path):
    evaluation().run(Digits(), tmp_path, progress=False)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="without readable settings"):
        evaluation().run(Digits(), tmp_path, progress=False)


def test_reward_functions_are_called_as_a_trainer_calls_them():
    calls = []

    def reward(prompts, completions, completion_ids, limit, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("column", [1] * len(prompts))
        log_metric("name", 1.0)
        calls.append((prompts, completions, completion_ids, limit, kwargs, trainer_state.global_step))
        return [1] * len(prompts)

    chats = [[{"role": "user", "content": f"digit {i}"}] for i in range(2)]
    rows = [{"prompt": chat, "limit": i, "completion": "gold"} for i, chat in enumerate(chats)]
    result = evaluation(rows, reward, k=2).run(Digits(), progress=False)
    ((prompts, completions, ids, limit, others, step),) = calls
    assert prompts == [chats[0], chats[0], chats[1], chats[1]]
    assert limit == [0, 0, 1, 1]
    assert others == {}, "a column called completion is not passed on"
    assert step == 0
    texts = [text for problem in result.problems for text in problem.completions]
    assert completions == [[{"role": "assistant", "content": text}] for text in texts]
    assert ids == [[ord(text[-1])] for text in texts]


def test_weighted_rewards_add_up_async_ones_and_none_among_them():
    async def slow(completions, **kwargs):
        await asyncio.sleep(0.01)
        return [0.5] * len(completions)

    def sometimes(completions, **kwargs):
        return [None, 1.0, math.nan, np.float32(1)] * (len(completions) // 4)

    result = evaluation(reward=[slow, sometimes], reward_weights=[1, 0.5]).run(Digits(), progress=False)
    assert result.problems[0].scores == [0.5, 1.0, 0.5, 1.0]
    assert result.metrics["avg@4"] == 0.75
    assert result.metrics["pass@1"] == 0.5
    alone = evaluation(reward=sometimes).run(Digits(), progress=False)
    assert alone.problems[0].scores == [None, 1.0, None, 1.0]
    assert (alone.metrics["avg@4"], alone.counts["unscored"]) == (0.5, 20)
    with_threshold = evaluation(reward=sometimes, success_threshold=0.0).run(Digits(), progress=False)
    assert with_threshold.metrics["pass@1"] == 0.5, (
        "a sample that nothing scored is no success, whatever the threshold"
    )


def test_an_async_reward_works_where_a_loop_runs_already():
    async def reward(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook():
        return evaluation(reward=reward).run(Digits(), progress=False).metrics["avg@4"]

    assert asyncio.run(notebook()) == 1.0


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda completions, **kwargs: [1.0], ValueError, "returned 1 rewards for 8 completions"),
        (lambda completions, **kwargs: 1.0, TypeError, "returned float; expected a list of 8 numbers"),
        (lambda completions, **kwargs: [math.inf] * 8, ValueError, "infinite"),
    ],
)
def test_a_reward_function_that_returns_nonsense_is_named(reward, error, message):
    with pytest.raises(error, match=message):
        evaluation(reward=reward).run(Digits(), progress=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": []}, ValueError, "no rows"),
        ({"data": iter([])}, TypeError, "Of a stream, take a list"),
        ({"data": [{"question": "?"}]}, ValueError, "needs a column 'prompt'; it has question"),
        ({"data": [{"prompt": "?", "prompts": 1}]}, ValueError, r"\['prompts'\]"),
        ({"data": [{"prompt": "?"}, {"prompt": "?", "a": 1}]}, ValueError, "Row 1 has the columns"),
        ({"data": [{"prompt": 3}]}, TypeError, "The prompt of row 0"),
        ({"k": 0}, ValueError, "at least 1; got 0"),
        ({"k": 4, "pass_at": [8]}, ValueError, r"from 1 to k \(4\); got \[8\]"),
        ({"reward": []}, ValueError, "empty list"),
        ({"reward": "a/reward-model"}, TypeError, "got str"),
        ({"reward_weights": [1, 2]}, ValueError, "1 reward functions but 2 weights"),
        ({"save_columns": ["answer"]}, ValueError, r"save_columns has \['answer'\]"),
        ({"confidence": 95}, ValueError, "confidence in"),
    ],
    ids=lambda value: str(value).split(" at 0x")[0][:40],  # the same in every process
)
def test_wrong_arguments_are_refused_before_any_work(changes, error, message):
    with pytest.raises(error, match=message):
        evaluation(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_sampling_out_of_range_is_refused_with_the_value(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value}"):
        Sampling(**changes)


def test_an_engine_that_returns_too_few_samples_is_refused():
    engine = Digits()
    generate = engine.generate
    engine.generate = lambda prompts, **kwargs: [group[:3] for group in generate(prompts, **kwargs)]
    with pytest.raises(ValueError, match=r"must return 4 samples for each of 2 prompts; got \[3, 3\]"):
        evaluation().run(engine, progress=False)


def test_an_answer_that_is_no_string_is_refused_at_once():
    engine = Digits()
    with pytest.raises(TypeError, match="answer_fn must return a string or None; got int: 8"):
        evaluation(answer_fn=lambda text: 8).run(engine, progress=False)
    assert len(engine.asked) == 1, "not after all problems have been sampled"


def test_columns_that_json_lacks_and_text_that_utf_8_lacks_are_saved(tmp_path):
    import datetime

    values = {"day": datetime.date(2025, 2, 1), "raw": b"\x00", "table": np.eye(2), "odd": "\ud800 é \u2028", "no": 1}
    rows = [{"prompt": "digit", **values}]

    def reward(completions, **kwargs):
        return [1.0] * len(completions)

    run = evaluation(rows, reward, save_columns=["day", "raw", "table", "odd"])
    first = run.run(Digits(), tmp_path, progress=False)
    engine = Digits()
    again = run.run(engine, tmp_path, progress=False)
    assert engine.asked == []
    assert again.problems == first.problems
    assert again.problems[0].columns == {
        "day": "2025-02-01",
        "raw": "<bytes>",
        "table": [[1.0, 0.0], [0.0, 1.0]],
        "odd": "\ud800 é \u2028",
    }


def test_the_bar_counts_problems_from_where_it_goes_on(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        evaluation().run(Digits(fails_at=2), tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    evaluation(name="science").run(Digits(), tmp_path)
    shown = capsys.readouterr().err
    assert "science:" in shown
    assert "4/10" in shown
    assert "10/10" in shown
    assert "avg@4=" in shown
