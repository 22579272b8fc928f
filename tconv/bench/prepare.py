"""Before a long run: every kernel that it needs, compiled in many processes at once."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Any

from . import cases
from .store import Settings, Store, describe
from .workers import Worker

WORTH = 8  # tasks, from which on several processes compile beforehand: each takes seconds to start


def distinct(pending: list[dict]) -> list[dict]:
    """The tasks whose calls differ.

    Suites share layers, under names of their own; and a training step launches what the other passes do.
    """
    found: dict[tuple, dict] = {}
    for task in pending:
        case = cases.find(task["suite"], task["name"])
        passes = ["training"] if "training" in task["passes"] else task["passes"]
        calls = case.problem or case.description, task["precision"], task["memory_format"]
        found.setdefault(calls, task | {"passes": passes})
    return list(found.values())


@dataclass
class Helper:
    """A process that prepares, one task after the other."""

    worker: Worker
    task: dict | None = None  # the one at hand
    deadline: float = 0.0  # of its next message, while a task is at hand

    def give(self, task: dict, seconds: float) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        self.worker.tell([task])


def prepare(settings: Settings, store: Store, pending: list[dict], progress: Any) -> None:
    """Compile what all that is pending launches on tconv, in several processes, so that Triton's cache on disk holds it.

    A task that crashes or hangs is left to the measuring process.
    """
    waiting, helpers, ready, done = distinct(pending), list[Helper](), False, 0
    begin, total = time.perf_counter(), len(waiting)
    progress.start(total, 0)
    progress.line(f"preparing {total} cases in up to {settings.compilers} processes")
    try:
        while waiting or helpers:
            _give(waiting, helpers, ready, settings)
            for helper in list(helpers):
                note = f"no result after {settings.timeout:.0f} s"
                try:
                    while message := helper.worker.next(0):
                        ready |= "ready" in message
                        helper.deadline = time.monotonic() + settings.timeout
                        if message.get("note") and helper.task:
                            progress.line(f"{describe(helper.task)}: not all is prepared, {message['note']}")
                        if "end" in message and helper.task:
                            progress.at(f"preparing {describe(helper.task)}", done := done + 1)
                            helper.task = None
                    note = ""
                except queue.Empty:
                    if not helper.task or time.monotonic() < helper.deadline:
                        continue
                helper.worker.stop()
                helpers.remove(helper)
                if not ready:
                    return progress.line(f"nothing is prepared: {note or helper.worker.last_words()}")
                if helper.task:
                    progress.at(f"preparing {describe(helper.task)}", done := done + 1)
                    progress.line(f"{describe(helper.task)}: not prepared, {note or helper.worker.last_words()}")
            time.sleep(0.01)
    finally:
        for helper in helpers:
            helper.worker.stop()
        store.spend({"compiling beforehand": time.perf_counter() - begin})


def _give(waiting: list[dict], helpers: list[Helper], ready: bool, settings: Settings) -> None:
    """Hand out tasks to processes that are idle or new, one process at first, until it is ready; end those that are of no use."""
    while waiting:
        idle = next((helper for helper in helpers if not helper.task), None)
        if not idle and len(helpers) == (settings.compilers if ready else 1):
            return
        if not idle:
            idle = Helper(Worker({"mode": "compile", "gpu": True}, open=True))
            helpers.append(idle)
        idle.give(waiting.pop(0), settings.timeout if ready else max(settings.timeout, 300.0))
    for helper in [each for each in helpers if not each.task]:
        helper.worker.stop()
        helpers.remove(helper)
