"""Memory that a process keeps."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from stbench.core.memory import keep_freed_memory, return_freed_memory

SCRIPT = """
import resource
import torch
from stbench.core.memory import keep_freed_memory

def faults():
    for _ in range(4):  # the first rounds fill the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(5_000_000) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory(False)
returned = faults()
keep_freed_memory()
print(returned, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    returned, kept = map(int, run.stdout.split())
    pages = 8 * 20_000_000 // resource.getpagesize()
    assert kept < pages / 20
    assert kept <= returned


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    keep_freed_memory()
    return_freed_memory()
