"""A process of the benchmark's own: what it is told, what it tells, and how it ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path


def environment(gpu: bool, **more: str) -> dict:
    """A worker's: this tconv importable, and Triton's interpreter where there is no GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    if not gpu:
        env["TRITON_INTERPRET"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    return env


class Worker:
    """A process of tconv.bench.worker: its messages one by one, and what it wrote to standard error.

    The request is its first line.  Unless `open`, that is all that it is told.
    """

    module = "tconv.bench.worker"

    def __init__(self, request: dict, open: bool = False, **env: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment(request["gpu"], **env),
        )
        self.compiles = request.get("mode") == "compile"
        self.tell(request)
        if not open:
            self.close()
        self.messages: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, what: dict | list) -> None:
        """Another line for it to read."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: its return code tells
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Tell it that there is nothing more."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.messages.put(line)
        self.messages.put(None)

    def next(self, timeout: float) -> dict | None:
        """The next message, or None at the end.  Raises queue.Empty after `timeout` seconds of silence."""
        line = self.messages.get(timeout=timeout)
        return None if line is None else json.loads(line)

    def stop(self) -> None:
        if self.process.poll() is None:
            if self.compiles and os.getpgid(self.process.pid) == self.process.pid:  # it leads the compilers it started
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """The end of standard error, for the row of a crash."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        code = self.process.returncode
        ending = f"signal {-code}" if code and code < 0 else f"exit status {code}"
        return f"{ending}: {lines[-1][:300]}" if lines else ending
