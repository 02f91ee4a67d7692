"""The ranks of a run: one process per device, and what they tell each other.

Every rank executes the same program. Rank 0, the main rank, reads and writes the run folder and prints; it
passes on what it finds. A run in one process is a world of one rank, in which every method is immediate.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "socket closed",
    "read error",
    "write error",
    "no such process",
    "remote process exited",
    "nccl communicator was aborted",
    "nccl error",
    "recvvalue failed",
    "sendbytes failed",
    "application timeout caused pair closure",
)
"""Parts of the messages of torch.distributed when another rank has died or does not answer."""


class RankLostError(Exception):
    """Another rank has died or does not respond."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, as seen by one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this rank on its machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of start:stop that are this rank's: contiguous, in sizes that differ by one at most."""
        size, rest = divmod(stop - start, self.size)
        first = start + self.rank * size + min(self.rank, rest)
        return first, first + size + (self.rank < rest)

    def from_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank.

        An exception that it raises is raised on every rank.
        """
        if self.size == 1:
            return function()
        error: Exception | None = None
        content: list[Any] = [None, None]
        if self.is_main:
            try:
                content[0] = function()
            except Exception as raised:
                error, content[1] = raised, _portable(raised)
        torch.distributed.broadcast_object_list(content, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if content[1] is not None:
            raise content[1]
        return content[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Waits for all of them."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return bool(value)

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.any(False)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on its device; does not synchronise a GPU with the host."""
        if self.size == 1:
            return values
        result = values.clone()
        torch.distributed.all_reduce(result)
        return result

    def collect(self, rows: Tensor) -> Tensor:
        """The rows (n,...) of all ranks, on the host, in the order of the ranks; n may differ."""
        if self.size == 1:
            return rows
        rows = rows.cpu().contiguous()
        counts = self.total(torch.nn.functional.one_hot(torch.tensor(self.rank), self.size) * len(rows))
        longest = int(counts.max())
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, on every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (n,...) of all ranks as one tensor, through which gradients flow; n is equal on all ranks.

        The gradient of a rank's rows is the sum of the gradients that all ranks compute for them.
        """
        return rows if self.size == 1 else _Gather.apply(rows, self)


class _Gather(torch.autograd.Function):
    """`World.gather`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.count = world, len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world.size)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        first = ctx.world.rank * ctx.count
        return ctx.world.total(gradient)[first : first + ctx.count], None


ALONE = World()
"""The world of a run in one process."""


class SharedStop:
    """A request to stop that all ranks see at the same step, whenever a signal reaches each of them.

    Each call starts to combine the ranks' flags and returns the result of the call before, which has arrived
    by then: no rank waits for another.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, requested: bool) -> bool:
        """Whether any rank had a request at the previous call; in one process, whether there is one now."""
        if self._world.size == 1:
            return requested
        before = self.finish()
        value = torch.tensor(int(requested))
        work = torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = work, value
        return before

    def finish(self) -> bool:
        """Wait for the flags that are on their way; whether one was set."""
        if self._pending is None:
            return False
        work, value = self._pending
        work.wait()
        self._pending = None
        return bool(value)


def describe_lost_rank(error: BaseException) -> str:
    """One sentence about an exception for which `is_lost_rank` is true, without gloo's addresses."""
    if isinstance(error, RankLostError):
        return str(error)
    waited = "time" in str(error).lower()
    return "another rank did not respond in time" if waited else "the connection to another rank has ended"


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exception says that another rank has died or does not respond."""
    if isinstance(error, RankLostError):
        return True
    message = str(error).lower()
    return (
        isinstance(error, RuntimeError)
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and any(part in message for part in LOST)
    )


def _portable(error: Exception) -> Exception:
    """The exception itself if another process can read it, otherwise one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
