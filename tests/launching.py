"""Starting a script in several processes, as a user would, and ending it when it hangs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


class Hangs(RuntimeError):
    """The processes did not end in time."""


def accelerate_command(script, arguments, *launcher):
    """`accelerate launch` on a port of its own, with the launcher's options first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", str(port)]
    return [*command, str(script), *map(str, arguments)]


def run(command, *, seconds, **env):
    """The exit status and the output of a command on CPUs; raises `Hangs` if it takes longer."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes, which killing it would leave behind
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        raise Hangs(output[-3000:]) from None
    return process.returncode, output


def commit():
    """The commit of the code that runs."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def record(path, scenario, found, **about):
    """Write what was found of a scenario, and at which commit, into a results file, beside what it has of others."""
    scenarios = json.loads(path.read_text())["scenarios"] if path.exists() else {}
    scenarios[scenario] = {"commit": commit(), **found}
    path.write_text(json.dumps({**about, "scenarios": scenarios}, indent=1) + "\n")
