"""Starting a script in several processes, as a user would, and ending it when it hangs."""

import os
import socket
import subprocess
import sys


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
