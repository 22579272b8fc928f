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
