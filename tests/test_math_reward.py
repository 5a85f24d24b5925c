"""Mathematical answers are found, compared in child processes, and none can hold up or harm the trainer."""

import asyncio
import copy
import importlib.util
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import vpd_trl.rewards
from tests import tiny
from vpd_trl.rewards import MathReward, extract_math_answer, math_pool
from vpd_trl.rewards.math_pool import Deadline, Outcome, WorkerError, WorkerPool


if importlib.util.find_spec("math_verify") is None:
    pytest.skip("needs math-verify", allow_module_level=True)

ENDLESS = r"\boxed{9^{9^{9^9}}}"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

# Text and its answer; None where it states none
ANSWERS = [
    (r"\boxed{5}", "5"),
    (r"So $x = \boxed{1}$ or rather $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    (r"\boxed{\frac{\sqrt{2}}{1+\frac{1}{3}}}", r"\frac{\sqrt{2}}{1+\frac{1}{3}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{x : x > 2\right\}}", r"\left\{x : x > 2\right\}"),
    (r"\boxed{[0, 1)}", "[0, 1)"),
    (r"\fbox{7}", "7"),
    (r"\boxed {7}", "7"),
    (r"\boxed{\text{E}}", r"\text{E}"),
    (r"\boxed{\boxed{5}}", "5"),
    ("\\boxed{\n5\n}", "5"),
    (r"\boxed{5}, so we write \boxed{}", "5"),
    (r"\boxed{5}, in the form \boxed{\text{your answer}} or \boxed{...}", "5"),
    (r"\boxed{}", None),
    (r"\boxed{ }", None),
    (r"\boxed{5", None),
    (r"\boxed{\frac{1}{2}", None),
    (r"\boxed{4} and then \boxed{5", None),
    (r"\boxed{4} is wrong. The answer is 5.", "4"),
    (r"<think>\boxed{3}</think>\boxed{4}", "4"),
    (r"<think>\boxed{3}", None),
    (r"\boxed{3}</think>The answer is 4.", "4"),
    ("", None),
    # Without a box
    ("The answer is 5.", "5"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is 4. No, the answer is 5.", "5"),
    ("The final answer is **42**", "42"),
    ("**Answer:** 42", "42"),
    ("**Answer**: 42", "42"),
    ("Answer: $x^2 + 1$", "x^2 + 1"),
    ("The answer is:\n\n$$\\frac{3}{4}$$", r"\frac{3}{4}"),
    (r"The answer is \(\pi\).", r"\pi"),
    (r"The answer is $\frac12$ because 3 > 2.", r"\frac12"),
    (r"The answer is 2\sqrt{2} meters.", r"2\sqrt{2}"),
    ("The answer is (2, 3).", "(2, 3)"),
    ("The answer is x = 5", "x = 5"),
    ("The answer is about 3.5 m.", "3.5 m"),
    ("The answer is 3/4 of the cake.", "3/4"),
    ("The answer is $5. Each costs $3.", "5"),
    ("The answer is 1,234 apples.", "1,234"),
    ("The answer is -7", "-7"),
    ("The answer is 50 percent.", "50%"),
    ("... = 42\n#### 42", "42"),
    ("<answer>42</answer>", "42"),
    (r"<answer>1</answer> <answer>$\frac{1}{2}$</answer>", r"\frac{1}{2}"),
    ("5", "5"),
    (" 5 \n", "5"),
    (r"$\frac{1}{2}$", r"\frac{1}{2}"),
    ("x = 5", "x = 5"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"The answer is \begin{pmatrix} 1 \\ 2 \end{pmatrix} as above.", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("maybe 42, maybe 7", None),
    ("The answer is maybe 42", None),
    ("The answer is not 42.", None),
    ("The answer isn't 42.", None),
    ("The answer is 3 or 4.", None),
    ("The answer is 5 million.", None),
    ("The answer is between 3 and 4.", None),
    ("The answer requires 3 steps.", None),
    ("The answer is", None),
    ("So we get 2 + 2 = 4.", None),
    ("There are 4 cases.\n5", None),
    ("?", None),
    (r"\boxed{" + "1+" * 3000 + "1}", None),
    ("The answer is " + "1+" * 3000 + "1", None),
]

# Reference and answer that are equal, as math-verify has it
EQUAL = [
    ("5", "5"),
    ("5", "5.0"),
    ("5", "x = 5"),
    ("x = 5", "5"),
    ("1/2", r"\frac{1}{2}"),
    ("1/2", r"\frac12"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", "50\\%"),
    ("50%", "50\\%"),
    (r"7.41\%", r"7.41\%"),
    (r"7.41\%", "0.0741"),
    (r"3\frac12", "7/2"),
    ("1/3", "0.333333"),
    ("1234", "1,234"),
    ("1,234", "1{,}234"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("x^2 - 1", "(x-1)(x+1)"),
    ("2x + 3", "y = 2x + 3"),
    ("1500", r"1.5 \times 10^{3}"),
    ("10", r"10\text{ cm}"),
    ("10", r"10 \text{ apples}"),
    ("10", r"\$10"),
    ("90", r"90^\circ"),
    ("90", "90°"),
    ("-3", "−3"),
    (r"\pi", "π"),
    ("1, 2, 3", "3, 2, 1"),
    (r"\{1, 2, 3\}", "3, 1, 2"),
    ("(1, 2, 3)", r"\left(1, 2, 3\right)"),
    ("(1, 2)", "1, 2"),
    ("[1, 2)", r"x \in [1, 2)"),
    (r"(-1, 2) \cup (3, 4)", r"(3, 4) \cup (-1, 2)"),
    ("x < 3", "3 > x"),
    (r"x \le 3", r"(-\infty, 3]"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    ("E", r"\text{E}"),
    (r"\text{(E)}", "E"),
    ("5", "5."),
    ("$5$", "5"),
    (r"\(5\)", "5"),
    (r"We get \boxed{5}", "5"),
    ("north", r"\text{north}"),
    (r"\text{North}", "north"),
    ("no solution", r"\text{No solution.}"),
    (7, "7"),
    (0.5, "1/2"),
    (1e-7, r"10^{-7}"),
    (2.5e20, r"2.5 \cdot 10^{20}"),
    ("5000", r"5\,000"),
    (r"1\,234\,567", "1,234,567"),
    ("5000", "5~000"),
    ("5", "5,"),
    # Bases, units, repetitions and brackets that don't contradict each other
    ("204_5", "204_{5}"),
    ("204_5", "x = 204_{5}"),
    ("21", "10101_2 = 21"),
    ("10101_2", "10101"),
    ("10101", "10101_2"),
    ("5", "5_{10}"),
    ("x_1^2 + x_2^2", "x^2_1 + x^2_2"),
    (r"5\text{ cm}", "5"),
    (r"5\mathrm{~cm}", r"5\text{ cm}"),
    (r"5\text{ inches}", r"5\text{ inch}"),
    (r"5\text{ apples}", r"5\text{ red apples}"),
    (r"5\text{ m}", r"5\text{ units}"),
    ("111111", "111,111"),
    ("1000000000", r"1,000,000,000\text{ km}"),
    ("1000000000", "1{,}000{,}000{,}000"),
    ("1000000000", r"1,\!000,\!000,\!000"),
    ("2, 2", "2,2"),
    (r"\{(1, 2), (2, 1)\}", "(1, 2), (2, 1)"),
    (r"\{1, 2\}", "2, 1"),
]
# What must not be taken for equal
DIFFERENT = [
    ("5", "6"),
    ("5", "-5"),
    ("5", "55"),
    ("5", r"5 \text{ or } 6"),
    ("5", "5.0001"),
    ("1/3", "0.33"),
    ("0.5", "5"),
    (r"7.41\%", "7.41"),
    ("(1, 2)", "(2, 1)"),
    ("[1, 2]", "(1, 2)"),
    ("(1, 2, 3)", "(1, 3, 2)"),
    ("1, 2, 3", "1, 2"),
    ("x", "y"),
    ("12345678901234567890", "12345678901234567891"),
    ("north", "south"),
    ("north", "thorn"),
    ("south", "shout"),
    ("north", "5"),
    ("5", r"\text{north}"),
    ("5", r"\frac{1}{"),
    ("5", "}{"),
    ("5", "?"),
    ("5", "nan"),
    ("5", r"\infty"),
    ("5", r"\frac{1}{0}"),
    ("12_{6}", "12_{5}"),
    ("12_6", "x = 12_5"),
    (r"5\text{ m}", r"5\text{ cm}"),
    (r"5\text{ hours}", r"5\text{ min}"),
    (r"5\text{ km/h}", r"5\mathrm{~m/s}"),
    ("2", "2,2"),
    ("2, 2", "2"),
    ("1, 2", "1, 2, 2"),
    (r"\{2, 1\}", "(1, 2)"),
    ("(1, 2)", r"\{1, 2\}"),
    (r"\left\{\frac{1}{2}, 1\right\}", r"\left(1, \frac{1}{2}\right)"),
]


@pytest.fixture(scope="module")
def reward():
    return MathReward(workers=2, timeout=10)


@pytest.fixture(scope="module")
def hasty():
    return MathReward(workers=2, timeout=1)


def boxed(answer):
    return rf"So the answer is \boxed{{{answer}}}."


def processes(reward):
    return [worker.process for worker in reward._pool._workers]


# ---- The answer of a text


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_an_answer_is_found_where_a_text_states_one(text, answer):
    assert extract_math_answer(text) == answer


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_strict_reading_takes_boxes_alone(text, answer):
    in_box = r"\boxed" in text.split("</think>")[-1] or r"\fbox" in text
    assert extract_math_answer(text, strict=True) == (answer if in_box else None)


def test_an_answer_that_was_found_is_found_in_itself():
    for _, answer in EQUAL:
        if "text" not in answer and not answer[0].isalpha():
            found = extract_math_answer(extract_math_answer(boxed(answer)))
            assert found is not None
            assert found.strip(".,") == answer.strip(".,")


def test_long_and_odd_texts_are_read_in_time():
    texts = (r"\boxed{" * 20_000, r"\boxed{1} " * 10_000, "answer " * 15_000, "The answer is " * 8000, "$" * 100_000)
    texts += (
        "answer: " + "1 " * 50_000,
        "<answer>" * 12_000,
        r"\boxed{" + "{" * 100_000,
        "#" * 100_000,
        "\\(" * 50_000,
    )
    start = time.process_time()
    for text in texts:
        extract_math_answer(text)
    assert time.process_time() - start < 10


# ---- Comparison


def test_equal_answers_are_worth_one(reward):
    golds, answers = zip(*EQUAL, strict=True)
    got = reward(completions=[boxed(a) for a in answers], answer=list(golds))
    assert [pair for pair, r in zip(EQUAL, got, strict=True) if r != 1.0] == []


def test_other_answers_are_worth_nothing(reward):
    golds, answers = zip(*DIFFERENT, strict=True)
    got = reward(completions=[boxed(a) for a in answers], answer=list(golds))
    assert [(pair, r) for pair, r in zip(DIFFERENT, got, strict=True) if r != 0.0] == []


def test_every_row_is_compared_with_its_own_reference(reward):
    completions = [boxed(i % 3) for i in range(12)]
    assert reward(completions, ["0", "1"] * 6) == [float(i % 3 == i % 2) for i in range(12)]


def test_no_answer_is_worth_nothing_and_no_reference_gives_no_reward(reward):
    got = reward(completions=["no idea", boxed(5), boxed(5)], answer=["5", None, float("nan")])
    assert got == [0.0, None, None]


def test_a_strict_reward_wants_a_box():
    strict = MathReward(strict=True, workers=1)
    assert strict(completions=["The answer is 5.", boxed(5), "maybe 42, maybe 5"], answer=["5"] * 3) == [0.0, 1.0, 0.0]


def test_conversations_are_read_by_their_last_assistant_message(reward):
    completions = [
        [{"role": "assistant", "content": boxed(5)}],
        [{"role": "assistant", "content": boxed(4)}, {"role": "tool", "content": "5"}],
    ]
    assert reward(completions=completions, answer=["5", "5"]) == [1.0, 0.0]


def test_thinking_that_the_prompt_opened_is_not_read(reward):
    completions = [boxed(5), boxed(4) + "</think>" + boxed(5)]
    assert reward(completions=completions, answer=["5"] * 2, prompts=["Q?<think>\n"] * 2) == [0.0, 1.0]
    opened = MathReward(opens_thinking=True, workers=1)
    assert opened(completions=completions, answer=["5"] * 2) == [0.0, 1.0]


def test_the_answers_column_can_be_another(reward):
    other = MathReward(answer_column="solution", workers=1)
    assert other(completions=[boxed(5)], solution=["5"], answer=["6"]) == [1.0]
    with pytest.raises(ValueError, match="needs the data set's column 'solution'"):
        other(completions=[boxed(5)], answer=["5"])
    with pytest.raises(ValueError, match="one reference answer per completion, 2 in all; got 1 answers"):
        reward(completions=[boxed(5)] * 2, answer=["5"])


@pytest.mark.parametrize("value", [["5"], True, {"a": 1}])
def test_a_reference_of_another_kind_is_refused_with_its_row(reward, value):
    with pytest.raises(TypeError, match=r"strings or numbers in the column 'answer'; row 1 of the batch has") as error:
        reward(completions=[boxed(5)] * 2, answer=["5", value])
    assert repr(value) in str(error.value)


# ---- References that can't be used


@pytest.mark.parametrize("gold", ["", r"\frac{1}{", r"0.\overline{3}", "?!"])
def test_a_reference_that_cannot_be_parsed_gives_no_reward_and_one_warning(gold, caplog):
    reward = MathReward(workers=1)
    with caplog.at_level(logging.WARNING, logger="vpd_trl"):
        assert reward(completions=[boxed(gold or 1), boxed(5)], answer=[gold, "5"]) == [None, 1.0]
        assert reward(completions=[boxed(5)], answer=[r"\frac{2}{"]) == [None]
    (record,) = caplog.records
    assert f"with the reference {gold!r} of the column 'answer'" in record.getMessage()


@POSIX
def test_a_reference_that_cannot_be_worked_out_is_not_held_against_the_answers(hasty, caplog):
    with caplog.at_level(logging.WARNING, logger="vpd_trl"):
        assert hasty(completions=[boxed(5)] * 2, answer=["9^{9^{9^9}}", "5"]) == [None, 1.0]
    assert "9^{9^{9^9}}" in caplog.text


# ---- Answers that would harm the trainer


def memory_of(process_id):
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


@POSIX
def test_an_endless_computation_costs_its_own_reward_alone(hasty):
    hasty(completions=[boxed(5)], answer=["5"])
    metrics = {}
    completions = [boxed(5), ENDLESS, boxed(6), r"\boxed{(10^8)!}", boxed(5), boxed(5.0)]
    start = time.perf_counter()
    got = hasty(
        completions=completions, answer=["5"] * 6, log_metric=lambda name, v: metrics.setdefault(name, []).append(v)
    )
    assert got == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert time.perf_counter() - start < 60
    assert metrics["rewards/math_reward/timed_out"] == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert hasty(completions=[boxed(5)], answer=["5"]) == [1.0], "its processes were replaced"


@POSIX
@pytest.mark.slow
def test_endless_computations_run_side_by_side():
    reward = MathReward(workers=4, timeout=2)
    assert reward(completions=[boxed(i) for i in range(4)], answer=["5"] * 4) == [0.0] * 4
    start = time.perf_counter()
    got = reward(completions=[rf"\boxed{{9^{{9^{{9^{i}}}}}}}" for i in (8, 9, 10, 11)], answer=["5"] * 4)
    assert got == [0.0] * 4
    assert time.perf_counter() - start < 7, "one after the other would take 8 s and four starts"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_a_process_cannot_take_more_memory_than_it_may():
    program = textwrap.dedent(f"""
        import runpy
        worker = runpy.run_path({math_pool._PROGRAM!r}, run_name="worker")
        class Bloated:
            def can_be_compared(self, gold): return True
            def equal(self, gold, answer):
                print("noise")
                if answer == "big":
                    bytearray(2**30)
                return True
        worker["serve"].__globals__["Comparison"] = Bloated
        worker["serve"](300)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    requests = [b'{"gold": "5", "answer": "%s", "seconds": 20}\n' % answer for answer in (b"big", b"small")]
    output, _ = process.communicate(b"".join(requests), timeout=60)
    assert output.splitlines() == [b'{"ready": true}', b'{"result": false}', b'{"result": true}']


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_trainers_own_memory_does_not_grow(hasty):
    hasty(completions=[boxed(5)], answer=["5"])
    before = memory_of(os.getpid())
    hasty(completions=[ENDLESS, boxed("7" * 1000), boxed("((" * 400), r"\boxed{(x+y+z)^{300}}"], answer=["5"] * 4)
    assert memory_of(os.getpid()) - before < 50
    assert all(memory_of(process.pid) < 400 for process in processes(hasty))


@POSIX
@pytest.mark.slow
def test_when_the_batchs_time_is_over_the_rest_gets_no_reward():
    reward = MathReward(workers=1, timeout=1, batch_timeout=1.5)
    reward(completions=[boxed(5)], answer=["5"])
    completions = [boxed(6), *(rf"\boxed{{9^{{9^{{9^{i}}}}}}}" for i in range(8, 16)), boxed(7)]
    start = time.perf_counter()
    got = reward(completions=completions, answer=["5"] * 10)
    assert got[:2] == [0.0, 0.0]
    assert got[-3:] == [None] * 3
    assert time.perf_counter() - start < 60


@POSIX
def test_a_process_that_dies_takes_one_answer_with_it():
    reward = MathReward(workers=1, timeout=30)
    reward(completions=[boxed(5)], answer=["5"])
    (victim,) = processes(reward)
    threading.Timer(0.5, victim.kill).start()
    assert reward(completions=[ENDLESS, boxed(5.0), boxed(6)], answer=["5"] * 3) == [0.0, 1.0, 0.0]
    (victim,) = processes(reward)
    victim.kill()
    victim.wait()
    assert reward(completions=[boxed("10/2")], answer=["5"]) == [1.0], "it died between two calls"


@POSIX
def test_a_process_that_was_stopped_is_not_waited_for():
    reward = MathReward(workers=1, timeout=1)
    reward(completions=[boxed(5)], answer=["5"])
    os.kill(processes(reward)[0].pid, signal.SIGSTOP)
    start = time.perf_counter()
    assert reward(completions=[boxed("10/2"), boxed(5.0)], answer=["5", "5"]) == [0.0, 1.0]
    assert time.perf_counter() - start < 60


@pytest.mark.slow
def test_processes_are_renewed_after_many_answers(monkeypatch):
    monkeypatch.setattr(math_pool, "ANSWERS_PER_WORKER", 3)
    reward = MathReward(workers=1)
    seen = set()
    for i in range(6):
        assert reward(completions=[boxed(f"{i}.0")], answer=["3"]) == [float(i == 3)]
        seen |= {process.pid for process in processes(reward)}
    assert len(seen) >= 2
    assert len(processes(reward)) <= 1


# ---- Where it can be called from


def test_it_works_in_threads_and_under_asyncio(reward):
    def ask():
        return reward(completions=[boxed(r"\frac{10}{2}"), boxed(6)], answer=["5", "5"])

    results = []
    threads = [threading.Thread(target=lambda: results.append(ask())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    async def in_loop():
        return [ask(), *await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(3)))]

    results += asyncio.run(in_loop())
    assert results == [[1.0, 0.0]] * 10
    assert len(processes(reward)) <= 2


@POSIX
def test_signal_handlers_and_alarms_of_the_trainer_are_left_alone(hasty):
    def handler(*args):
        raise AssertionError("an alarm in the trainer")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 300)
        hasty(completions=[ENDLESS, boxed(6)], answer=["5", "5"])
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 200 < signal.getitimer(signal.ITIMER_REAL)[0] < 300
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@POSIX
@pytest.mark.slow
def test_it_can_be_interrupted_and_used_again():
    reward = MathReward(workers=1, timeout=60)
    reward(completions=[boxed(5)], answer=["5"])
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        reward(completions=[ENDLESS, boxed(6)], answer=["5", "5"])
    assert time.perf_counter() - start < 40
    assert reward(completions=[boxed(5.0)], answer=["5"]) == [1.0]


@POSIX
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_child_processes_of_its_own(reward):
    assert reward(completions=[boxed(5.0)], answer=["5"]) == [1.0]
    before = [process.pid for process in processes(reward)]
    child = os.fork()
    if child == 0:
        right = reward(completions=[boxed(5.0), boxed(6)], answer=["5", "5"]) == [1.0, 0.0]
        own = not {process.pid for process in processes(reward)} & set(before)
        reward._pool._workers[0].kill()
        os._exit(0 if right and own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert reward(completions=[boxed(6.0)], answer=["5"]) == [0.0]
    assert [process.pid for process in processes(reward)] == before


def test_processes_start_with_the_first_comparison_and_are_kept():
    reward = MathReward(workers=1)
    assert processes(reward) == []
    reward(completions=[boxed(6)], answer=["5"])
    (first,) = processes(reward)
    reward(completions=[boxed(7)] * 4, answer=["5"] * 4)
    assert processes(reward) == [first]


def test_processes_end_with_the_reward():
    reward = MathReward(workers=1)
    reward(completions=[boxed(6)], answer=["5"])
    (process,) = processes(reward)
    del reward
    assert process.wait(10) is not None


@POSIX
def test_processes_end_when_their_trainer_is_gone():
    idle, busy = math_pool._Worker(512), math_pool._Worker(512)
    for worker in (idle, busy):
        worker.wait_until_ready()
    busy.process.stdin.write(b'{"gold": "5", "answer": "9^{9^{9^9}}", "seconds": 2}\n')
    for worker in (idle, busy):
        worker.process.stdin.close()
    assert idle.process.wait(20) == 0
    assert busy.process.wait(20) == -signal.SIGALRM


@pytest.mark.slow
def test_a_script_needs_no_main_guard_and_ends_without_noise(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(r"""
        import sys
        from vpd_trl.rewards import math_reward
        assert "math_verify" not in sys.modules and "sympy.core" not in dir(), "the comparing is done by others"
        print("REWARDS", math_reward(completions=["\\boxed{2/4}", "\\boxed{3}"], answer=["1/2", "1/2"]))
        print("PROCESSES", *(worker.process.pid for worker in math_reward._pool._workers))
        """)
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("REWARDS", "PROCESSES"))]
    assert done.returncode == 0, done.stderr
    assert [name for name, _ in lines] == ["REWARDS", "PROCESSES"], "the script ran once"
    assert lines[0][1] == "[1.0, 0.0]"
    assert not any(sign in done.stderr for sign in ("Traceback", "Exception", "Warning: subprocess"))
    for process_id in lines[1][1].split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process_id), 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda reward: pickle.loads(pickle.dumps(reward))])
def test_a_copy_has_the_settings_and_processes_of_its_own(copied):
    reward = MathReward(strict=True, answer_column="key", timeout=7, workers=1, name="maths")
    reward(completions=[boxed(5.0)], key=["5"])
    copy_of_it = copied(reward)
    assert processes(copy_of_it) == []
    assert copy_of_it(completions=[boxed(5.0), "5"], key=["5", "5"]) == [1.0, 0.0]
    assert (copy_of_it.timeout, copy_of_it.workers, copy_of_it.__name__) == (7, 1, "maths")
    assert {p.pid for p in processes(reward)}.isdisjoint(p.pid for p in processes(copy_of_it))


def test_the_same_answer_is_compared_once(reward, monkeypatch):
    asked = []
    run = WorkerPool.run
    monkeypatch.setattr(
        WorkerPool, "run", lambda self, requests, *rest: asked.extend(requests) or run(self, requests, *rest)
    )
    assert reward(completions=[boxed(r"\frac{8}{2}")] * 16, answer=["4"] * 8 + ["9"] * 8) == [1.0] * 8 + [0.0] * 8
    assert sorted(len(request) for request in asked) == [1, 1, 2, 2], "two references once, and a pair with each"
    asked.clear()
    assert reward(completions=[boxed("$9/8$")] * 4, answer=["9/8"] * 4) == [1.0] * 4
    assert asked == [{"gold": "9/8"}], "the same text is equal"


# ---- When it can't work


def test_a_missing_package_is_said_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ImportError, match=r'pip install "vpd-trl\[tasks\]"'):
        MathReward()
    monkeypatch.delitem(vars(vpd_trl.rewards), "math_reward", raising=False)
    with pytest.raises(ImportError, match=r'pip install "vpd-trl\[tasks\]"'):
        from vpd_trl.rewards import math_reward  # noqa: F401


def test_an_unknown_name_of_the_package_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'maths_reward'"):
        vpd_trl.rewards.maths_reward  # noqa: B018


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit(3)", "it ended with 3, without a word"),
        ('print(\'{"error": "ImportError: no antlr"}\')', "ImportError: no antlr"),
    ],
)
def test_processes_that_do_not_start_are_an_error_and_no_zeros(monkeypatch, program, reason):
    monkeypatch.setattr(math_pool, "_START", program)
    reward = MathReward(workers=2)
    with pytest.raises(WorkerError, match=f"did not start: {reason}"):
        reward(completions=[boxed(5), boxed(6)], answer=["5", "7"])
    monkeypatch.undo()
    assert reward(completions=[boxed(5), boxed(6)], answer=["5", "7"]) == [1.0, 0.0]


def test_a_process_that_does_not_start_leaves_its_work_to_the_others(monkeypatch):
    started = []
    start = WorkerPool._take

    def take(self):
        started.append(1)
        if len(started) == 1:
            raise OSError("no more processes")
        return start(self)

    monkeypatch.setattr(WorkerPool, "_take", take)
    reward = MathReward(workers=2)
    assert reward(completions=[boxed("a"), boxed("b")], answer=["x", "y"]) == [0.0, 0.0]
    assert len(started) >= 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strict": 1}, TypeError, "strict must be True or False; got 1"),
        ({"opens_thinking": "no"}, TypeError, "opens_thinking must be True or False; got 'no'"),
        ({"answer_column": ""}, ValueError, "answer_column must be a text that is not empty; got ''"),
        ({"timeout": 0}, ValueError, "timeout must be a number of seconds above 0; got 0"),
        ({"timeout": float("inf")}, ValueError, "timeout must be .* got inf"),
        ({"batch_timeout": None}, ValueError, "batch_timeout must be .* got None"),
        ({"memory_limit": 100}, ValueError, r"memory_limit must be at least 256 \(MiB\); got 100"),
        ({"memory_limit": 1e3}, ValueError, r"memory_limit must be .* got 1000\.0"),
        ({"workers": 0}, ValueError, "workers must be a whole number of at least 1, or None; got 0"),
        ({"workers": True}, ValueError, "workers must be .* got True"),
        ({"name": ""}, ValueError, "name must be a text that is not empty; got ''"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_given_and_what_is_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        MathReward(**arguments)


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    sizes = {}
    for world in ("1", "4", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
        sizes[world] = MathReward()._pool.size
    assert sizes == {"1": 8, "4": 3, "64": 1}
    assert MathReward(workers=5)._pool.size == 5


# ---- What is logged, and the trainer


def test_what_was_found_is_logged(reward):
    extra, metrics = {}, {}
    reward(
        completions=[boxed("2/4"), "no idea", boxed(3)],
        answer=["1/2", "1/2", None],
        log_extra=extra.__setitem__,
        log_metric=lambda name, value: metrics.setdefault(name, []).append(value),
    )
    assert extra == {"math_answer": ["2/4", None, "3"]}
    assert metrics == {"rewards/math_reward/answered": [1.0, 0.0], "rewards/math_reward/timed_out": [0.0, 0.0]}


def test_a_deadline_begins_when_it_is_started():
    deadline = Deadline(0.01)
    time.sleep(0.02)
    assert not deadline.passed
    deadline.start()
    time.sleep(0.02)
    deadline.start()
    assert deadline.passed


def test_no_requests_start_no_processes():
    pool = WorkerPool(2, 512)
    assert pool.run([], 1.0, Deadline(1.0)) == []
    assert pool._workers == []
    assert Outcome.YES is not Outcome.NO


def test_a_trainer_takes_it_and_logs_it_by_its_name(tmp_path, reward):
    trainer = tiny.trainer(tmp_path, reward_funcs=reward, method="grpo", feedback_fn=None, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert "rewards/math_reward/mean" in logged
    assert logged["rewards/math_reward/timed_out"] == 0.0
