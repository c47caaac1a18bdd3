"""Runs a part of a benchmark in a fresh process: one that has nothing of the others in its memory.

``call("torch_reprise._bench.memory", "grow", {...})`` imports the module in a new interpreter,
calls ``grow(tell, **{...})`` there and gives back what it returns. Arguments and result travel as
JSON. ``tell(note)`` in the child is a call of ``on_note(note)`` in the parent, which is how
a progress bar moves.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

Tell = Callable[[str], object]


def call(
    module: str,
    function: str,
    arguments: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    on_note: Tell = lambda note: None,
) -> Any:
    """Calls ``module.function`` in a new process.

    Args:
        environment: variables in addition to this process's own.

    Raises:
        RuntimeError: the child failed; the message has the end of what it wrote to stderr.
    """
    request = json.dumps({"module": module, "function": function, "arguments": arguments})
    command = [sys.executable, "-m", __name__, request]
    result: list[Any] = []
    # A file and not a pipe: nobody reads it until the child has ended.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "note" in message:
                    on_note(message["note"])
                else:
                    result.append(message["result"])
        if process.returncode or not result:
            errors.seek(0)
            tail = "".join(errors.readlines()[-15:]) or "it wrote nothing to stderr"
            raise RuntimeError(
                f"{module}.{function} failed in a process of its own "
                f"(status {process.returncode}):\n{tail}"
            )
    return result[0]


def _main(request: str) -> None:
    asked = json.loads(request)

    def say(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    function = getattr(importlib.import_module(asked["module"]), asked["function"])
    say(result=function(lambda note: say(note=note), **asked["arguments"]))


if __name__ == "__main__":
    _main(sys.argv[1])
