"""The process that checks and measures cases, or one model: JSON lines on standard input and output.

The first line is the request; to measure cases, or to compile beforehand, each line after it is a list of tasks.
A message is {"head": ...}, {"begin": id}, {"row": ...} or {"end": id}; of a model {"model": ...} or {"refused": text};
before measuring {"ready": true} and {"end": id}.
A case that kills the process costs itself alone: `run` starts another for the rest.  A task is one case at one
precision in one memory format.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from .. import dispatch
from . import cases, compiler, measure, providers
from .measure import Run
from .model import measure_model
from .task import SPENT, Task, Truth, run_task, spent
from .terminal import Refused


def tasks_told(channel: Iterable[str]) -> Iterator[dict]:
    """The tasks of each further line, until there is none."""
    for line in channel:
        yield from json.loads(line)


def compile_kernels(told: Iterable[str], say) -> None:
    """Compile what every pass of every task launches, so that it lies in Triton's cache on disk."""
    from triton.runtime import driver

    target, real = dispatch.target_of(torch.device("cuda", 0)), driver.active
    device = real.get_current_target(), real.utils.get_device_properties(0)
    compiler.stand_in(target, compiler.Driver(*device, compiler.launching_nothing(real)))
    say(ready=True)
    for task in tasks_told(told):
        note = ""
        for layer in cases.find(task["suite"], task["name"]).layers:
            try:
                compiler.compile_layer(layer, task["passes"], task["precision"], task["memory_format"])
            except Exception as error:  # the measuring process compiles what is missing, or fails in its turn
                note = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        say(end=task["id"], note=note)


def _first_of(name: str, task: Task) -> float:
    """Call a provider's forward pass once; the milliseconds that took."""
    run = Run(name, lambda: None)
    run.function = measure.call(run, partial(providers.find(name).make, task.work("forward", 0.0)))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    measure.call(run)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def first_calls(request: dict) -> dict:
    """Milliseconds of the first call in this process, on tconv (import of Triton and compilation included) and cuDNN."""
    asked = request["tasks"][0]
    task = Task(request, asked, Truth(cases.find(asked["suite"], asked["name"]), "fp32", "cuda"))
    return {name: _first_of(name, task) for name in ("tconv", "cudnn")}


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error

    def say(**message):
        channel.write(json.dumps(message) + "\n")

    told = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a provider starts must not read the tasks
    request = json.loads(told.readline())
    mode = request.get("mode", "measure")
    if mode == "compile":
        os.setpgrp()  # so that whoever stops this process stops the compiler that it waits for, too
        compile_kernels(told, say)
    elif mode == "first":
        say(first=first_calls(request))
    elif mode == "model":
        say(head=measure.head(request["gpu"]))
        try:
            say(model=measure_model(*(request[k] for k in ("spec", "precision", "memory_format", "budget", "most"))))
        except Refused as error:
            say(refused=str(error))
    else:
        head = measure.head(request["gpu"])
        if request["head"] is None:
            if request["gpu"]:
                with spent("roofs"):
                    head["roofs"] = measure.roofs()
                head["clocks"] = measure.clocks()  # under load, or nearly
            say(head=head)
            request["head"] = head
        for name in request["same"]:
            if head[name] != request["head"][name]:
                return say(refused=f"the run was begun with {name} {request['head'][name]}, now it is {head[name]}")
        request["roofs"] = request["head"].get("roofs")
        gc.collect()
        gc.freeze()  # each capture of a CUDA graph collects garbage, which need not go over all modules every time
        kept: dict = {}
        for task in tasks_told(told):
            say(begin=task["id"])
            run_task(request, task, say, kept)
            say(seconds=dict(SPENT))  # task by task: a run that is stopped has told them
            SPENT.clear()
            say(end=task["id"])
        if request["gpu"]:
            say(clocks=measure.clocks())


if __name__ == "__main__":
    main()
