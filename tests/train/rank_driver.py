"""Train with several gloo ranks. Runs as a separate process, whose children are forked: imports happen once.

    python rank_driver.py CASES.json

CASES.json is a list of {"name", "ranks", "output", "request": arguments of RunRequest}, optionally with
"stop", the step after which the run is interrupted, and "shard"; or {"name", "ranks", "command": arguments of
stbench}. Prints one JSON line per case: {"name", "losses": one mapping per step, "stopped", "error"}, and
{"name", "exitcodes"} if a rank failed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
faulthandler.enable()

from stbench.cli.app import app  # noqa: E402
from stbench.config.plan import PlannedStage, prepare  # noqa: E402
from stbench.config.resolve import RunRequest, resolve  # noqa: E402
from stbench.core.registry import load_builtins  # noqa: E402
from stbench.data.dataset import get_dataset  # noqa: E402
from stbench.train import engine, launch  # noqa: E402
from stbench.train.hooks import Hook  # noqa: E402


class Losses(Hook):
    """Collects the losses of every step; interrupts the run after step `stop` of its last stage."""

    every = 1

    def __init__(self, stop: int | None) -> None:
        self.found: list[dict[str, float]] = []
        self._stop = stop

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        self.found.append(dict(losses))
        if stage.is_last and step == self._stop:
            os.kill(os.getpid(), 15)


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Train the run of a case as one of its ranks."""
    hook = Losses(case.get("stop"))
    result: dict[str, Any] = {"name": case["name"], "losses": hook.found, "stopped": False, "error": None}
    request = dict(case["request"])
    prepared = prepare(resolve(RunRequest(request.pop("backbone"), request.pop("recipe"), **request)))
    with launch.joined(torch.device("cpu")) as world:
        options = engine.RunOptions(Path(case["output"]), world=world, shard=case.get("shard", False))
        try:
            engine.run(prepared, options, [hook] if world.is_main else [])
        except engine.Interrupted:
            result["stopped"] = True
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
            os.write(1, f"{json.dumps(result)}\n".encode())  # sys.stdout of other ranks is /dev/null
            os._exit(1)
    return result


def fork(case: dict[str, Any], rank: int, port: int) -> int:
    """Start one rank of a case; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    # A child recreates torch's thread pool on first use. Two threads of autograd that do so at the same time
    # end it by "Invalid thread pool!", so it is done here.
    torch.set_num_threads(1)
    try:
        if case["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case["ranks"]), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        result = {"name": case["name"]}
        if "command" in case:
            app(args=case["command"], standalone_mode=False)
        else:
            result = train(case)
        if rank == 0:
            print(json.dumps(result), flush=True)
        os._exit(0)
    except BaseException as error:
        print(json.dumps({"name": case["name"], "error": repr(error)}), file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    load_builtins()
    get_dataset("digits")
    for case in json.loads(Path(sys.argv[1]).read_text()):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pids = [fork(case, rank, store.port) for rank in range(case["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            print(json.dumps({"name": case["name"], "exitcodes": codes}), flush=True)


if __name__ == "__main__":
    main()
