"""The serving benchmark leaves no server behind when it is told to end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
# A server that says that it was started and then never listens, and a benchmark that says so too.
SERVER = (
    "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.recv(1)"
)
PROGRAM = """
import socket, sys
from types import SimpleNamespace
import serving

class Server(serving.Server):
    def wait(self, ready):
        with socket.create_connection(("127.0.0.1", int(sys.argv[2]))):
            return super().wait(ready)

serving.end_well()
Server([sys.executable, "-c", sys.argv[1], sys.argv[2]], SimpleNamespace(threads=1), "/")
"""


def test_ending_the_benchmark_ends_its_servers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        port = str(listener.getsockname()[1])
        bench = subprocess.Popen([sys.executable, "-c", PROGRAM, SERVER, port], cwd=BENCH)
        connections = [listener.accept()[0] for _ in range(2)]
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 128 + signal.SIGTERM
        for connection in connections:  # both are gone
            with connection:
                connection.settimeout(60)
                assert connection.recv(1) == b""
