"""Programs in processes of their own, in which CUDA was not initialised before.

To start Python and import torch takes seconds, so that is done once: a server that has imported
what programs need, and has touched no device, forks for each of them. As a script this file is
that server.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
TIMEOUT = 120

_server: subprocess.Popen[str] | None = None


def _running_server() -> subprocess.Popen[str]:
    global _server
    if _server is None or _server.poll() is not None:
        folders = os.pathsep.join([str(HERE), str(HERE.parent / "devices")])
        _server = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            env={**os.environ, "PYTHONPATH": folders},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_stop, _server)
    return _server


def _stop(server: subprocess.Popen[str]) -> None:
    server.communicate(timeout=TIMEOUT)


def play(program: str, **given: Any) -> Any:
    """What `program` hands to `report`; the names in `given` are its globals.

    It has `torch`, `cudasim`, `torch_reprise` and the names of the prelude below.
    """
    server = _running_server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([program, given]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server is gone"
    status, complaints, result = json.loads(answer)
    assert (status, complaints) == (0, ""), f"exit status {status}\n{complaints}"
    return json.loads(result)


PRELUDE = """
import functools, json, os
import cudasim, torch, torch_reprise
from torch.nn.functional import dropout
from torch_reprise import checkpoint, ledger, rng

def run(function, *args):
    return function(*args) if form is None else checkpoint(function, *args, use_reentrant=form)

def draws(x):
    return dropout(x.sin(), 0.5).exp()

def offsets():
    return [(g.initial_seed(), g.get_offset()) for g in torch.cuda.default_generators]

def used():
    return [i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]

torch.manual_seed(3)
assert not torch.cuda.is_initialized()
"""


def _child(program: str, given: dict[str, Any], output: IO[str], complaints: IO[str]) -> None:
    """Never returns. Not through the interpreter's end: device threads may still be busy."""
    signal.alarm(TIMEOUT)
    os.dup2(complaints.fileno(), 2)
    status = 1
    try:
        names = {**given, "report": lambda value: output.write(json.dumps(value))}
        exec(compile(PRELUDE + program, "program", "exec"), names)
        output.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    exec(PRELUDE, {})
    for line in sys.stdin:
        program, given = json.loads(line)
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as complaints:
            child = os.fork()
            if child == 0:
                _child(program, given, output, complaints)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            complaints.seek(0)
            print(json.dumps([status, complaints.read(), output.read()]), flush=True)


if __name__ == "__main__":
    _serve()
