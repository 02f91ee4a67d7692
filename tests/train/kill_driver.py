"""Kill runs with SIGKILL at chosen events and let the same command finish them. Runs as a separate process.

    python kill_driver.py FOLDER EVENT...

An EVENT is FUNCTION:N (the N-th call of a function), FUNCTION.fsync:N (the N-th fsync inside it) or
any:FRACTION (a call of the package, by its position in the run).

Prints one JSON line per event: {"event", "killed", "same", "where"}. A profile function counts the events, so
the program does not need to know about the test. Children are forked, so imports happen once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from stbench.train import engine

torch.set_num_threads(1)

from stbench.config.plan import prepare  # noqa: E402
from stbench.config.resolve import RunRequest, resolve  # noqa: E402
from stbench.core.registry import load_builtins  # noqa: E402
from stbench.data.dataset import get_dataset  # noqa: E402

OVERRIDES = {
    "train.batch": 8,
    "train.save_every": 2,
    "backbone.width": 24,
    "backbone.depth": 3,
    "backbone.heads": 2,
    "recipe.teacher_block": 2,
    "recipe.student_block": 1,
    "eval.points": [3, 6],
    "eval.samples": 40,
    "eval.steps": 2,
    "eval.guidance": [1.0, 1.5],
}
PACKAGE = str(Path(engine.__file__).parents[1])


def train(output: Path) -> None:
    """The run under test: Self-Transcendence with 6 steps per stage, evaluated twice."""
    spec = resolve(RunRequest("sit", "self-transcendence", steps=6, overrides=OVERRIDES))
    engine.run(prepare(spec), engine.RunOptions(output, keep="all"))


def profile(event: str, tell: int) -> Any:
    """A profile function that kills this process at `event`, or counts all events into the pipe `tell`."""
    name, _, number = event.partition(":")
    function, syncing = name.removesuffix(".fsync"), name.endswith(".fsync")
    seen = 0

    def watch(frame: FrameType, kind: str, argument: Any) -> None:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE) or function not in ("any", frame.f_code.co_name):
            return
        if kind != "c_call" if syncing else kind != "call":
            return
        if syncing and argument is not os.fsync:
            return
        seen += 1
        if seen == int(number):
            os.write(tell, frame.f_code.co_name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    return watch


def child(output: Path, event: str | None) -> tuple[bool, str]:
    """Fork, train, maybe die; returns whether it was killed and in which function."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        if event is not None:
            sys.setprofile(profile(event, write))
        train(output)
        os._exit(0)
    os.close(write)
    where = b"".join(iter(lambda: os.read(read, 1024), b"")).decode()
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, f"the run failed after {event}"
    return killed, where


def digest(output: Path) -> dict[str, str]:
    """Hashes of all weight files, and the curve and stage records without wall-clock fields and checksums."""
    found = {}
    (folder,) = (path.parent for path in (*output.glob("*/spec.json"), *output.glob("spec.json")))
    for file in sorted(folder.rglob("checkpoints/*/[er][ma][aw]-*.safetensors")):
        found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("curve.jsonl", "stages.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        clockless = [{k: v for k, v in row.items() if "seconds" not in k and k != "checksum"} for row in rows]
        found[name] = json.dumps(clockless, sort_keys=True)
    found["status"] = json.loads((folder / "status.json").read_text())["state"]
    return found


def count_calls(output: Path) -> int:
    """Number of calls of the package's functions in a complete run."""
    calls = 0

    def watch(frame: FrameType, kind: str, argument: Any) -> None:
        nonlocal calls
        calls += kind == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(watch)
    train(output)
    sys.setprofile(None)
    return calls


def main() -> None:
    """Train a reference run, then one run per event that is killed and resumed."""
    folder, events = Path(sys.argv[1]), sys.argv[2:]
    load_builtins()
    get_dataset("digits")
    train(folder / "reference")
    # Count a second run: like the runs that are killed, it finds the statistics and all caches ready.
    shutil.copytree(folder / "reference" / ".cache", folder / "counted" / ".cache")
    calls = count_calls(folder / "counted")
    expected = digest(folder / "reference")
    assert expected["status"] == "finished" and len(expected) == 8, expected
    for number, event in enumerate(events):
        output = folder / str(number)
        # computing the reference statistics would take most of the time
        shutil.copytree(folder / "reference" / ".cache", output / ".cache")
        if event.startswith("any:"):
            event = f"any:{max(1, int(float(event[4:]) * calls))}"
        killed, where = child(output, event)
        child(output, None)
        same = digest(output) == expected
        print(json.dumps({"event": event, "killed": killed, "same": same, "where": where}), flush=True)


if __name__ == "__main__":
    main()
