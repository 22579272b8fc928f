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
CONTEXT = 10**9  # bytes, more than CUDA's context and loaded kernels take on the device in each process


def distinct(pending: list[dict]) -> list[dict]:
    """The tasks whose calls differ, largest first, with `bytes`, what one holds on the device at most.

    Suites share layers, under names of their own; and a training step launches what the other passes do.
    """
    found: dict[tuple, dict] = {}
    for task in pending:
        case = cases.find(task["suite"], task["name"])
        passes = ["training"] if "training" in task["passes"] else task["passes"]
        calls = case.problem or case.description, task["precision"], task["memory_format"]
        found.setdefault(calls, task | {"passes": passes, "bytes": case.call_bytes})
    return sorted(found.values(), key=lambda t: -t["bytes"])


@dataclass
class Helper:
    """A process that prepares, one task after the other."""

    worker: Worker
    task: dict | None = None  # the one at hand
    deadline: float = 0.0  # of its next message, while a task is at hand

    @property
    def bytes(self) -> int:
        return CONTEXT + (self.task["bytes"] if self.task else 0)

    def give(self, task: dict, seconds: float) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        self.worker.tell([task])


def prepare(settings: Settings, store: Store, pending: list[dict], progress: Any) -> None:
    """Call tconv once for all that is pending, in several processes, so that Triton's cache on disk holds its kernels.

    A task begins when it fits in the device's memory beside those under way, or alone.  One that crashes or hangs is
    left to the measuring process.
    """
    waiting, helpers, room, done = distinct(pending), list[Helper](), 0, 0
    begin, total = time.perf_counter(), len(waiting)
    progress.start(total, 0)
    progress.line(f"preparing {total} cases in up to {settings.compilers} processes")
    try:
        while waiting or helpers:
            _give(waiting, helpers, room, settings)  # before it has told the room, the first process has a task
            for helper in list(helpers):
                note = f"no result after {settings.timeout:.0f} s"
                try:
                    while message := helper.worker.next(0):
                        room = room or message.get("free", 0)
                        helper.deadline = time.monotonic() + settings.timeout
                        if "end" in message and helper.task:
                            progress.at(f"preparing {describe(helper.task)}", done := done + 1)
                            helper.task = None
                    note = ""
                except queue.Empty:
                    if not helper.task or time.monotonic() < helper.deadline:
                        continue
                helper.worker.stop()
                helpers.remove(helper)
                if not room:
                    return progress.line(f"nothing is prepared: {note or helper.worker.last_words()}")
                if helper.task:
                    progress.at(f"preparing {describe(helper.task)}", done := done + 1)
                    progress.line(f"{describe(helper.task)}: not prepared, {note or helper.worker.last_words()}")
            time.sleep(0.01)
    finally:
        for helper in helpers:
            helper.worker.stop()
        store.spend({"compiling beforehand": time.perf_counter() - begin})


def _give(waiting: list[dict], helpers: list[Helper], room: int, settings: Settings) -> None:
    """Hand out what fits in `room`, largest first, to processes that are idle or new; end those that are of no use."""
    while waiting and (room or not helpers):  # the first process tells how much is free; until then it is alone
        idle = next((helper for helper in helpers if not helper.task), None)
        if not idle and len(helpers) == settings.compilers:
            return
        free = room - sum(helper.bytes for helper in helpers) - (0 if idle else CONTEXT)
        alone = not any(helper.task for helper in helpers)
        task = next((each for each in waiting if alone or each["bytes"] <= free), None)
        if not task:
            return
        if not idle:
            idle = Helper(Worker({"mode": "compile", "gpu": True}, open=True))
            helpers.append(idle)
        idle.give(task, settings.timeout if room else max(settings.timeout, 300.0))
        waiting.remove(task)
    if not waiting:
        for helper in [each for each in helpers if not each.task]:
            helper.worker.stop()
            helpers.remove(helper)
