"""What a sweep starts for each run. `python -m stbench.child PARENT ARGUMENTS...` is `stbench ARGUMENTS...`,
and when the process PARENT is gone, however it died, this one saves and ends as after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from stbench.cli import app as cli

WATCH_SECONDS = 0.5


def watch(parent: int) -> None:
    """Ask this process to end, once, when its parent is no longer `parent`."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Bind this process to its parent, then be the command line."""
    parent = int(sys.argv.pop(1))
    threading.Thread(target=watch, args=(parent,), daemon=True).start()
    cli.main()


if __name__ == "__main__":
    main()
