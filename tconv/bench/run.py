"""A run: which tasks, and the worker processes that do them.

A worker measures many tasks in turn.  What it reports is appended to RESULT.json.partial at once; when it dies, the
task at hand is marked as crashed and another worker goes on with the next.  A model has a worker for each precision
and memory format.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cases
from .store import Settings, Store
from .task import base_row
from .terminal import Refused

SAME = ("device", "driver", "torch", "triton", "cudnn", "commit")  # what a resumed run must share with its first part
WORTH = 8  # tasks, from which on several processes compile beforehand: each takes seconds to start
CONTEXT = 10**9  # bytes, more than CUDA's context and loaded kernels take on the device in each process


def matches(pattern: str, suite: str, case: cases.Case) -> bool:
    """Whether a case's suite, name and description fit --match.  Raises ValueError for a bad pattern."""
    try:
        return re.search(pattern, f"{suite} {case.name} {case.description}") is not None
    except re.error as error:
        raise ValueError(f"--match {pattern!r} is not a regular expression: {error}") from error


def tasks(settings: Settings) -> list[dict]:
    """A task for every case, precision and memory format; those of one case that share a draw lie together."""
    found = []
    for suite in settings.suites:
        found += [(suite, case.name, case) for case in cases.suite(suite)]
    for text in settings.layers:
        layer = cases.parse_layer(text)
        found.append(("layer", layer.name, cases.Case("layer", layer.name, (layer,))))
    listed = []
    for suite, name, case in found:
        if not matches(settings.match, suite, case):
            continue
        passes = [p for p in settings.passes if p == "forward" or not case.problem]
        for precision in sorted(settings.precisions, key=cases.PRECISIONS.index):
            for memory_format in settings.formats:
                if (memory_format == "channels_last" and case.layer.geometry.ndim == 1) or not passes:
                    continue
                task = {"suite": suite, "name": name, "precision": precision, "memory_format": memory_format}
                listed.append({"id": "|".join(task.values()), "passes": passes, **task})
    return listed


def environment(gpu: bool, **more: str) -> dict:
    """A worker's: this tconv importable, and Triton's interpreter where there is no GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    if not gpu:
        env["TRITON_INTERPRET"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    return env


class Worker:
    """A process of tconv.bench.worker: its messages one by one, and what it wrote to standard error."""

    module = "tconv.bench.worker"

    def __init__(self, request: dict, **env: str):
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
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request))
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; its return code tells
        self.messages: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

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


def run(settings: Settings, store: Store, progress: Any) -> None:
    """Do every task that is not done yet."""
    begin = time.perf_counter()
    listed = tasks(settings)
    pending = [t for t in listed if t["id"] not in store.done]
    if settings.gpu and settings.compilers > 1 and "tconv" in settings.providers and len(pending) >= WORTH:
        prepare(settings, store, pending, progress)
    progress.start(len(listed), len(listed) - len(pending))
    while pending:
        _batch(settings, store, progress, pending[: settings.batch])
        pending = [t for t in pending if t["id"] not in store.done]
    if settings.gpu and settings.first_calls and "tconv" in settings.providers:
        store.first = _first_calls(settings, listed, progress)
    store.spend({"all": time.perf_counter() - begin})


def _batch(settings: Settings, store: Store, progress: Any, batch: list[dict]) -> None:
    """One worker process, until its batch is done or a task stopped it."""
    request = {"gpu": settings.gpu, "head": store.head, "same": SAME, "tasks": batch, **settings.kept()}
    worker = Worker(request)
    current: dict | None = None
    by_id = {t["id"]: t for t in batch}
    shown: list[dict] = []
    failed = ""
    try:
        while True:
            try:
                # Before its first task a worker starts, and the first of a run measures the roofs.
                message = worker.next(settings.timeout if current else max(settings.timeout, 300.0))
            except queue.Empty:
                failed = "timeout"
                break
            if message is None:
                break
            if "refused" in message:
                raise Refused(message["refused"])
            if "begin" in message:
                current, shown = by_id[message["begin"]], []
                progress.at(describe(current), len(store.done))
                continue
            store.take(message)
            if "row" in message:
                shown.append(message["row"])
            if "end" in message:
                current = None
                progress.at("", len(store.done))
                for text in lines(shown):
                    progress.line(text)
    finally:
        worker.stop()
    if current is None:
        if any(t["id"] in store.done for t in batch):
            return  # all of them, or those before the process ended between two
        raise Refused(f"the measuring process did not start: {failed or worker.last_words()}")
    status = failed or "crashed"
    note = f"no result after {settings.timeout:.0f} s" if failed else worker.last_words()
    row = base_row(current, cases.find(current["suite"], current["name"])) | {"status": status, "note": note}
    store.take({"row": row})
    store.take({"end": current["id"]})
    progress.line(f"{describe(current)}: {status}, {note}")


def run_models(requests: list[dict], timeout: float) -> Iterator[dict]:
    """For each request a worker's {"head": ..., "model": ...}; a crash or timeout stands in the check of its model.

    Raises Refused where the model cannot be loaded or checked.
    """
    for request in requests:
        worker, status = Worker(request), "crashed"
        told: dict = {"head": {}}
        try:
            while message := worker.next(timeout if told["head"] else max(timeout, 300.0)):
                told |= message
        except queue.Empty:
            status = "timeout"
        finally:
            worker.stop()
        if "refused" in told:
            raise Refused(told["refused"])
        if "model" not in told:
            note = worker.last_words() if status == "crashed" else f"no result after {timeout:.0f} s"
            asked = {k: request[k] for k in ("spec", "precision", "memory_format")}
            told["model"] = asked | {"check": {"status": status, "note": note}, "rows": []}
        yield told


def describe(task: dict) -> str:
    return f"{task['name']} {task['precision']} {task['memory_format']}"


def lines(rows: list[dict]) -> list[str]:
    """A line for each pass of a task that has just ended: every provider's time, or what is wrong."""
    found: dict[str, list[str]] = {}
    for row in rows:
        name = row["provider"] or "case"
        if row["status"] == "ok":
            text = f"{name} {row['ms']:.3f}"
        elif row["status"] == "checked":
            text = f"{name} checked, rms error {row['rms_err']:.1e}"
        else:
            text = f"{name} {row['status'].upper()} ({row['note']})"
        found.setdefault(row["pass"], []).append(text)
    first = rows[0] if rows else {}
    about = f"{first.get('case')} {first.get('precision')} {first.get('memory_format')}"
    return [f"{about} {pass_name}: {', '.join(texts)}" for pass_name, texts in found.items()]


def distinct(pending: list[dict]) -> list[dict]:
    """The tasks whose calls differ, largest first, with `bytes`, what one holds on the device at most.

    Suites share layers, under names of their own; and a training step launches what the other passes do.
    """
    found: dict[tuple, dict] = {}
    for task in pending:
        case = cases.find(task["suite"], task["name"])
        passes = ["training"] if "training" in task["passes"] else task["passes"]
        calls = case.problem or case.description, task["precision"], task["memory_format"]
        found.setdefault(calls, task | {"passes": passes, "bytes": case.check_bytes})
    return sorted(found.values(), key=lambda t: -t["bytes"])


@dataclass
class Share:
    """A process that prepares, and its tasks: the one at hand first."""

    worker: Worker
    tasks: list[dict]
    deadline: float  # of its next message

    @property
    def bytes(self) -> int:
        return CONTEXT + (self.tasks[0]["bytes"] if self.tasks else 0)


def prepare(settings: Settings, store: Store, pending: list[dict], progress: Any) -> None:
    """Call tconv once for all that is pending, in several processes, so that Triton's cache on disk holds its kernels.

    A task begins when it fits in the device's memory beside those under way, or alone.  One that crashes or hangs is
    left to the measuring process.
    """
    waiting, running, room, done = distinct(pending), list[Share](), 0, 0
    begin, total = time.perf_counter(), len(waiting)
    progress.start(total, 0)
    progress.line(f"preparing {total} cases in up to {settings.compilers} processes")
    try:
        while waiting or running:
            # The first process tells how much memory is free; until then it is alone.
            free = room - sum(share.bytes for share in running)
            first = next((i for i, t in enumerate(waiting) if not running or CONTEXT + t["bytes"] <= free), None)
            if first is not None and len(running) < settings.compilers:
                # Smaller and smaller shares, so that all end together.
                last = first + max(1, len(waiting) // (4 * settings.compilers))
                tasks, waiting[first:last] = waiting[first:last], []
                worker = Worker({"mode": "compile", "gpu": True, "tasks": tasks})
                running.append(Share(worker, tasks, time.monotonic() + max(settings.timeout, 300.0)))
                continue
            for share in list(running):
                note = f"no result after {settings.timeout:.0f} s"
                try:
                    while message := share.worker.next(0):
                        room = room or message.get("free", 0)
                        share.deadline = time.monotonic() + settings.timeout
                        if "end" in message:
                            ended, *share.tasks = share.tasks
                            progress.at(f"preparing {describe(ended)}", done := done + 1)
                    note = ""
                except queue.Empty:
                    if time.monotonic() < share.deadline:
                        continue
                share.worker.stop()
                running.remove(share)
                if not room:
                    return progress.line(f"nothing is prepared: {note or share.worker.last_words()}")
                if share.tasks:
                    lost, *rest = share.tasks
                    progress.at(f"preparing {describe(lost)}", done := done + 1)
                    waiting = sorted(waiting + rest, key=lambda t: -t["bytes"])
                    progress.line(f"{describe(lost)}: not prepared, {note or share.worker.last_words()}")
            time.sleep(0.05)
    finally:
        for share in running:
            share.worker.stop()
        store.spend({"compiling beforehand": time.perf_counter() - begin})


def _first_calls(settings: Settings, listed: list[dict], progress: Any) -> list[dict]:
    """Cold first calls of one case of each number of dimensions, with empty kernel caches, side by side."""
    chosen: dict[int, dict] = {}
    for task in listed:
        case = cases.find(task["suite"], task["name"])
        if "forward" in task["passes"] and not case.problem:
            chosen.setdefault(case.layer.geometry.ndim, task)
    progress.line("timing cold first calls")
    found = []
    with tempfile.TemporaryDirectory() as root:
        started: list[tuple[dict, Worker]] = []
        for task in list(chosen.values())[: settings.first_calls]:
            request = {"mode": "first", "gpu": True, "tasks": [task | {"memory_format": "contiguous"}]}
            cache = Path(root) / str(len(started))
            started.append((task, Worker(request, TRITON_CACHE_DIR=str(cache), CUDA_CACHE_PATH=str(cache / "cuda"))))
        for task, worker in started:
            try:
                message = worker.next(settings.timeout)
            except queue.Empty:
                message = None
            worker.stop()
            for provider, ms in (message or {}).get("first", {}).items():
                found.append({k: task[k] for k in ("suite", "name", "precision")} | {"provider": provider, "ms": ms})
    return found
