"""A run: which tasks, and the worker processes that do them.

A worker measures many tasks in turn.  What it reports is appended to RESULT.json.partial at once; when it dies, the
task at hand is marked as crashed and another worker goes on with the next.  Each GPU has a worker; a model has one for
each precision and memory format.
"""

from __future__ import annotations

import os
import queue
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from . import cases
from .prepare import WORTH, prepare
from .store import Settings, Store, describe
from .task import base_row
from .terminal import Refused
from .workers import Worker

SAME = ("device", "driver", "torch", "triton", "cudnn", "commit")  # what a resumed run must share with its first part


def matches(pattern: str, suite: str, case: cases.Case) -> bool:
    """Whether a case's suite, name, description and classes fit --match.  Raises ValueError for a bad pattern."""
    classes = ", ".join(cases.classes(case.layer))
    try:
        return re.search(pattern, f"{suite} {case.name} {case.description} {classes}") is not None
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


def run(settings: Settings, store: Store, progress: Any) -> None:
    """Do every task that is not done yet."""
    begin = time.perf_counter()
    listed = tasks(settings)
    pending = [t for t in listed if t["id"] not in store.done]
    try:
        if settings.gpu and settings.compilers > 1 and "tconv" in settings.providers and len(pending) >= WORTH:
            prepare(settings, store, pending, progress)
        progress.start(len(listed), len(listed) - len(pending))
        measure(settings, store, progress, pending)
        if settings.gpu and settings.first_calls and "tconv" in settings.providers:
            store.first = _first_calls(settings, listed, progress)
    finally:  # also of a part that is stopped
        store.take({"seconds": {"all": time.perf_counter() - begin}})


@dataclass
class Lane:
    """What one GPU does: its process, and the tasks that were handed to it and have not ended."""

    env: dict[str, str]
    worker: Worker | None = None
    tasks: list[dict] = field(default_factory=list)
    handed: int = 0  # tasks, to this process
    current: dict | None = None  # begun, not ended
    doing: str = ""  # pass and provider that the process is at
    rows: list[dict] = field(default_factory=list)  # of the current task
    deadline: float = 0.0  # of the next message
    refused: str = ""  # why no process of it starts: it is left out then


def measure(settings: Settings, store: Store, progress: Any, pending: list[dict]) -> None:
    """Hand the tasks, those of one case together, to a process for each GPU."""
    waiting = [list(group) for _, group in groupby(pending, lambda t: (t["suite"], t["name"]))]
    lanes = [Lane(env) for env in _devices(settings)]
    try:
        while waiting or any(lane.worker for lane in lanes):
            if all(lane.refused for lane in lanes):
                raise Refused(lanes[0].refused)
            for lane in (each for each in lanes if not each.refused):
                # The first process of a run measures the roofs; until they are known it is alone.
                if waiting and not lane.worker and (store.head or not any(other.worker for other in lanes)):
                    request = {"gpu": settings.gpu, "head": store.head, "same": SAME, **settings.kept()}
                    lane.worker, lane.handed = Worker(request, open=True, **lane.env), 0
                    # Before its first message a process starts, and the first of a run measures the roofs.
                    lane.deadline = time.monotonic() + max(settings.timeout, 300.0)
                    _hand(lane, waiting, settings)
                elif lane.worker:
                    _listen(lane, waiting, settings, store, progress)
            time.sleep(0.01)
    finally:
        for lane in lanes:
            if lane.worker:
                lane.worker.stop()


def _devices(settings: Settings) -> list[dict[str, str]]:
    """The environment of each GPU's process."""
    if settings.gpus == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(settings.gpus)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in visible.split(",")[: settings.gpus]]


def _hand(lane: Lane, waiting: list[list[dict]], settings: Settings) -> None:
    """Another case for the lane's process; or none, if it has had enough or nothing is left."""
    assert lane.worker is not None
    if waiting and lane.handed < settings.batch:
        lane.tasks = waiting.pop(0)
        lane.handed += len(lane.tasks)
        lane.worker.tell(lane.tasks)
    else:
        lane.worker.close()


def _listen(lane: Lane, waiting: list[list[dict]], settings: Settings, store: Store, progress: Any) -> None:
    """Take what the lane's process has said, and what is to be said about its end."""
    assert lane.worker is not None
    failed = ""
    try:
        while message := lane.worker.next(0):
            lane.deadline = time.monotonic() + settings.timeout
            if "refused" in message:
                raise Refused(message["refused"])
            if "begin" in message:
                lane.current, lane.rows, lane.doing = lane.tasks[0], [], ""
                progress.at(describe(lane.current), len(store.done))
                continue
            if "doing" in message:
                lane.doing = f", at {message['doing']}"
                continue
            store.take(message)
            if "row" in message:
                lane.rows.append(message["row"])
            if "end" in message:
                lane.current = None
                del lane.tasks[0]
                progress.at("", len(store.done))
                for text in lines(lane.rows):
                    progress.line(text)
                if not lane.tasks:
                    _hand(lane, waiting, settings)
    except queue.Empty:
        if time.monotonic() < lane.deadline:
            return
        failed = "timeout"
    worker, lane.worker = lane.worker, None
    worker.stop()
    if lane.current:
        lost, lane.current = lane.tasks.pop(0), None
        note = (f"no result after {settings.timeout:.0f} s" if failed else worker.last_words()) + lane.doing
        row = base_row(lost, cases.find(lost["suite"], lost["name"]))
        store.take({"row": row | {"status": failed or "crashed", "note": note}})
        store.take({"end": lost["id"]})
        progress.line(f"{describe(lost)}: {failed or 'crashed'}, {note}")
    elif len(lane.tasks) == lane.handed:
        lane.refused = f"the measuring process did not start: {failed or worker.last_words()}"
        progress.line(lane.refused)
    if lane.tasks:
        waiting.insert(0, lane.tasks)
        lane.tasks = []


def run_models(requests: list[dict], timeout: float) -> Iterator[dict]:
    """For each request a worker's {"head": ..., "model": ...}; a crash or timeout stands in the check of its model, and what
    refuses a further precision or memory format than the first.

    Raises Refused where the model cannot be loaded or checked at the first.
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
        if "refused" in told and request is requests[0]:
            raise Refused(told["refused"])
        if "model" not in told:
            note = worker.last_words() if status == "crashed" else f"no result after {timeout:.0f} s"
            if "refused" in told:
                status, note = "refused", told["refused"]
            asked = {k: request[k] for k in ("spec", "precision", "memory_format")}
            told["model"] = asked | {"check": {"status": status, "note": note}, "rows": []}
        yield told


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
