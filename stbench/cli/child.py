"""The process that a sweep starts for each run.

`python -m stbench.cli.child PARENT ARGUMENTS...` is `stbench ARGUMENTS...`, except that it saves and exits,
as after Ctrl-C, when the process PARENT no longer exists, even if that was killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from stbench.cli import app

WATCH_SECONDS = 0.5


def watch(parent: int) -> None:
    """Send SIGTERM to this process once its parent is no longer `parent`."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Watch the parent in a thread and run the command line."""
    parent = int(sys.argv.pop(1))
    threading.Thread(target=watch, args=(parent,), daemon=True).start()
    app.main()


if __name__ == "__main__":
    main()
