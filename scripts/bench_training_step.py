"""Measures the seconds per step of `milora train` in two source trees, alternating: A B A B ...

    python scripts/bench_training_step.py --tree OLD --tree NEW --steps 4 -- --backbone FOLDER --task arc-easy ...

Each tree has its own process, which runs `milora train` with the flags after `--` and waits for a signal before every
step. A step's time ends where the next step would begin. It includes forward, backward, optimizer and, with bi-level
training, the dev step. The first step of each tree is a warm-up. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKER = """
import resource, sys, time
from transformers import TrainerCallback
from milora.training import train
from milora.training.trainer import MiLoraTrainer
from milora_cli.train import parse

answers = open(3, "w")

class Turns(TrainerCallback):
    started = None
    def turn(self):
        if self.started is not None:
            now = resource.getrusage(resource.RUSAGE_SELF)
            processor = now.ru_utime + now.ru_stime - self.processor
            print("step", time.perf_counter() - self.started, processor, file=answers, flush=True)
        else:
            print("ready", file=answers, flush=True)
        sys.stdin.readline()
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.processor, self.started = used.ru_utime + used.ru_stime, time.perf_counter()
    def on_step_begin(self, args, state, control, **more):
        self.turn()
    def on_train_end(self, args, state, control, **more):
        self.turn()
        history = [entry for entry in state.log_history if "loss" in entry]
        print("losses", *(entry["loss"] for entry in history), file=answers, flush=True)
    def on_evaluate(self, args, state, control, metrics=None, **more):
        print("dev", metrics["eval_loss"], file=answers, flush=True)

begin = MiLoraTrainer.__init__

def with_turns(self, *args, callbacks=None, **more):
    begin(self, *args, callbacks=[*(callbacks or ()), Turns()], **more)

MiLoraTrainer.__init__ = with_turns
train(*parse(sys.argv[1:]))
"""


class Tree:
    """A source tree with its training process."""

    def __init__(self, path: Path, flags: list[str], steps: int, folder: Path) -> None:
        read, write = os.pipe()
        environment = {**os.environ, "PYTHONPATH": str(path / "src")}
        command = [sys.executable, "-c", WORKER, *flags, "--max_steps", str(steps), "--output_dir", str(folder)]
        prepared = ["bash", "-c", f'exec 3>&{write}; exec "$@"', "bash", *command]
        self.process = subprocess.Popen(
            prepared, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment, pass_fds=[write], text=True
        )
        os.close(write)
        self.answers = os.fdopen(read)
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.dev: list[float] = []
        self.losses: list[float] = []

    def wait(self) -> str:
        """Reads answers until a step or the process ends."""
        for line in self.answers:
            kind, *values = line.split()
            if kind == "dev":
                self.dev.append(float(values[0]))
            elif kind == "losses":
                self.losses = [float(value) for value in values]
            else:
                if kind == "step":
                    self.seconds.append(float(values[0]))
                    self.processor_seconds.append(float(values[1]))
                return kind
        return "end"

    def go(self) -> None:
        """Starts the next step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def summary(self) -> dict[str, Any]:
        """The measurements, without the warm-up."""
        return {
            "seconds": self.seconds[1:],
            "median_seconds": statistics.median(self.seconds[1:]),
            "processor_seconds": self.processor_seconds[1:],
            "train_losses": self.losses,
            "dev_losses": self.dev,
        }


def main() -> None:
    """Runs the trees alternately."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="append", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=4, help="steps of each, the warm-up included")
    parser.add_argument("--output", type=Path, default=Path("bench-training-step"), help="where adapters go")
    parser.add_argument("flags", nargs="*", help="flags of milora train, after --")
    options = parser.parse_args()
    started = time.perf_counter()
    trees = [
        Tree(path, options.flags, options.steps, options.output / str(index)) for index, path in enumerate(options.tree)
    ]
    for tree in trees:
        tree.wait()
    for _ in range(options.steps):
        for tree in trees:
            tree.go()
            tree.wait()
    for tree in trees:
        tree.go()
        while tree.wait() != "end":
            pass
        tree.process.wait()
    first, last = trees[0].seconds[1:], trees[-1].seconds[1:]
    ratios = [before / after for before, after in zip(first, last, strict=True)]
    record = {
        "trees": {str(path): tree.summary() for path, tree in zip(options.tree, trees, strict=True)},
        "times_faster": {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)},
        "flags": options.flags,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
