"""What a run is asked for, and what it has so far: the partial file from which a stopped run resumes, the result."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

from .task import COLUMNS
from .terminal import Refused


@dataclass
class Settings:
    """What a run does; the command line fills it in."""

    suites: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    providers: list[str] = field(default_factory=list)
    match: str = ""
    budget: float = 0.1  # seconds of timing a pass of a task
    fewest: int = 5  # rounds, whatever the budget
    most: int = 60
    timeout: float = 300.0  # seconds a task
    batch: int = 200  # tasks a worker process
    gpus: int = 1  # GPUs that share the tasks
    compilers: int = 0  # processes that compile kernels beforehand
    first_calls: int = 3  # cases whose cold first call is timed, in processes of their own
    gpu: bool = False

    def kept(self) -> dict:
        """What is written beside the rows, and must agree when a run is resumed."""
        names = (
            *("suites", "layers", "match", "passes", "precisions", "formats", "providers"),
            *("budget", "fewest", "most", "gpu"),
        )
        return {name: getattr(self, name) for name in names}


class Store:
    """The rows so far, in memory and in the partial file."""

    def __init__(self, path: Path, settings: Settings, resume: bool):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.head: dict | None = None
        self.rows: list[dict] = []
        self.done: set[str] = set()
        self.first: list[dict] = []
        self.clocks: dict = {}
        self.seconds: dict[str, float] = {}  # by what they went into
        lines: list[dict] = []
        if self.partial.exists():
            if not resume:
                raise Refused(f"{self.partial} is what a stopped run left: --resume goes on with it, or remove it")
            lines = self._load(settings.kept())
        elif resume and not path.exists():
            raise Refused(f"there is nothing to resume: {self.partial} does not exist")
        elif resume:
            raise Refused(f"{path} is finished; there is nothing to resume")
        try:
            self.file = self.partial.open("w")
        except OSError as error:
            raise Refused(f"cannot write {self.partial}: {error.strerror}") from error
        for line in [{"settings": settings.kept()}, *lines]:
            self._write(line)

    def _load(self, now: dict) -> list[dict]:
        before, kept = _partial_messages(self.partial)
        if before is not None and before != now:
            changed = [f"{k} {before.get(k)} (now {v})" for k, v in now.items() if v != before.get(k)]
            raise Refused(f"{self.partial} was begun with other options: {'; '.join(changed)}")
        for message in kept:  # what did not end is measured again
            self._take(message)
        return kept

    def _take(self, message: dict) -> None:
        if "head" in message:
            self.head = message["head"]
        elif "row" in message:
            self.rows.append(message["row"])
        elif "end" in message:
            self.done.add(message["end"])
        elif "clocks" in message:
            self.clocks = message["clocks"]
        elif "seconds" in message:
            self.spend(message["seconds"])

    def spend(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def _write(self, message: dict) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()

    def take(self, message: dict) -> None:
        self._take(message)
        self._write(message)

    def stop(self) -> None:
        """Leave the partial file for --resume, unless no task ended."""
        self.file.close()
        if not self.done:
            self.partial.unlink()

    def finish(self, settings: Settings) -> dict:
        """Write the result as JSON and CSV, and remove the partial file."""
        head = dict(self.head or {})
        if self.clocks:
            head["clocks_at_end"] = self.clocks
        head["gpus"], head["seconds"] = settings.gpus, {k: round(v, 1) for k, v in self.seconds.items()}
        rows = [{key: rounded(value) for key, value in row.items()} for row in self.rows]
        result = {"head": head, "settings": settings.kept(), "rows": rows, "first_calls": self.first}
        self.path.write_text(dump(result))
        with self.path.with_suffix(".csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row | {"classes": ", ".join(row["classes"] or ())} for row in rows)
        self.file.close()
        self.partial.unlink()
        return result


def _partial_messages(path: Path) -> tuple[dict | None, list[dict]]:
    """Of a partial file: the settings that it was begun with, and what was said of the tasks that ended."""
    messages = []
    for text in path.read_text().splitlines():
        try:
            messages.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the line at which the run was stopped
    ended = {m["end"] for m in messages if "end" in m}
    said = [m for m in messages if m.keys() & {"head", "end", "seconds"} or ("row" in m and task_id(m["row"]) in ended)]
    return (messages[0].get("settings") if messages else None), said


def stopped(path: Path) -> dict:
    """What a stopped run has so far, from its partial file, as a result."""
    settings, said = _partial_messages(path)
    head: dict = next((m["head"] for m in said if "head" in m), {})
    head = head | {"stopped": sum("end" in m for m in said)}
    return {"head": head, "settings": settings or {}, "rows": [m["row"] for m in said if "row" in m], "first_calls": []}


def rounded(value):
    """A figure to six digits, more than any is certain to: a long run has a million of them."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dump(result: dict) -> str:
    """A result as JSON text, a row a line: a long run has tens of thousands."""
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    rest = {key: value for key, value in result.items() if key != "rows"}
    return json.dumps(rest, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'


def task_id(row: dict) -> str:
    return "|".join(row[k] for k in ("suite", "case", "precision", "memory_format"))


def describe(task: dict) -> str:
    return f"{task['name']} {task['precision']} {task['memory_format']}"
