"""Processes meet: each learns the others' values, or why all have to stop."""

import sys

from tests.launching import accelerate_command, run


# Each case with its result: what `meet` returns, or the kind of error and a part of its text, on processes 0 and 1
SCRIPT = """
import sys
from accelerate import Accelerator
from vpd_trl import processes

accelerator = Accelerator(cpu=True)
rank, objects = accelerator.process_index, 0
gather_object = processes.gather_object


def counted(value):
    global objects
    objects += 1
    return gather_object(value)


processes.gather_object = counted


def outcome(*arguments, **options):
    global objects
    objects = 0
    try:
        found = processes.meet(accelerator, *arguments, **options)
    except processes.StoppedTogether as error:
        found = str(error)
    return found, objects


assert outcome("here") == ([None, None], 0)
assert outcome("here", 10 * rank - 2**40) == ([-(2**40), 10 - 2**40], 0)
assert outcome("here", 7 if rank else None) == ([None, 7], 0)
assert outcome("here", {"a": rank}) == ([{"a": 0}, {"a": 1}], 1), "an object of one process takes objects of all"
assert outcome("here", "text" if rank else 3) == ([3, "text"], 1)
assert outcome("here", bool(rank)) == ([False, True], 1), "a truth is no number"
found, objects = outcome("there" if rank else "here", 5)
assert objects == 1 and "process 0 is at here; process 1 is at there" in found, found
found, objects = outcome("here", 5, error=ValueError("broken") if rank == 0 else None)
assert objects == 1 and ((found == [5, 5]) if rank == 0 else "Process 0 failed, so all stop. ValueError: broken" in found)
with processes.stop_together(accelerator):
    pass
try:
    with processes.stop_together(accelerator):
        if rank:
            raise KeyError("mine")
except KeyError:
    assert rank
except processes.StoppedTogether as error:
    assert not rank and "mine" in str(error)
else:
    raise AssertionError("went on")
accelerator.end_training()
print(f"process {rank} is done", flush=True)
"""


def test_processes_learn_of_each_other_by_numbers_alone_unless_there_is_more_to_say(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command = accelerate_command(script, [], *launcher, "--dynamo_backend", "no")
    status, output = run(command, seconds=120, ACCELERATE_USE_CPU="true", PYTHONPATH=":".join(sys.path))
    assert status == 0, output[-3000:]
    assert all(f"process {rank} is done" in output for rank in range(2))
