"""A process of our own that does one risky thing over its pipes, and can be ended from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsin.errors import EngineError

# The search path comes over stdin: -I keeps Python's settings in the environment out of the process
# and -S skips `site`, which halves its start.
_LAUNCH = (
    "import json, runpy, sys;"
    "start = json.loads(sys.stdin.buffer.readline());"
    "sys.path[:] = start['path'];"
    "runpy.run_path(start['worker'], run_name='__main__')"
)


class WorkerProcess:
    """Python running one file, which reads its settings as a line of JSON and then what it is sent.

    A process that has gone is found out when it is asked: sending and reading give nothing then.
    """

    def __init__(self, worker: Path, settings: Mapping[str, Any]) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable or "", "-I", "-S", "-c", _LAUNCH],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(
                f"{worker.stem} was not started",
                why=f"it runs in a process of its own: {error.strerror}",
                remedy="Run Opsin from a Python installation that its user may execute",
            ) from None
        self._owner = os.getpid()
        path = [entry or str(Path.cwd()) for entry in sys.path]
        for line in ({"path": path, "worker": str(worker)}, settings):
            self.send(json.dumps(line).encode() + b"\n")

    @property
    def alive(self) -> bool:
        """Whether it runs, and is this process's own: a fork's parent keeps it."""
        return self._owner == os.getpid() and self._process.poll() is None

    def send(self, data: bytes) -> None:
        """Write all of `data` to it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def line(self) -> bytes:
        """The next line that it writes, with its end; less if it ends before."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def read(self, size: int) -> bytes:
        """The next bytes that it writes; less if it ends before."""
        assert self._process.stdout is not None
        return self._process.stdout.read(size)

    def kill(self) -> None:
        """End it at once; may be called from any thread, while another waits for it."""
        self._process.kill()

    def close(self) -> None:
        """End it and give back what it holds."""
        if self._owner != os.getpid():
            return
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()
