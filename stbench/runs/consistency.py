"""Whether the records of a run fit together, which the checksum of one record cannot show. Opens no file."""

from __future__ import annotations

from collections.abc import Mapping

from stbench.core.errors import UserError
from stbench.runs.records import RunRecord
from stbench.runs.schema import REMEDY


def require_consistent(record: RunRecord, counts: Mapping[str, int]) -> None:
    """Check that no line, stage or protocol is missing, and that all files are of the same age.

    Args:
        record: The run.
        counts: The number of lines of curve.jsonl and stages.jsonl that status.json records.

    Raises:
        UserError: If the records do not fit together.
    """
    for name, found in (("curve", len(record.curve)), ("stages", len(record.stages))):
        if found < counts[name]:
            raise _damaged(f"{record.path}/{name}.jsonl", f"at least {counts[name]} lines", str(found))
    for number, point in enumerate(record.curve, start=1):
        if point.protocol not in record.protocols:
            where = f"{record.path}/protocols.json"
            raise _damaged(
                where, f"protocol {point.protocol!r} of curve.jsonl line {number}", "no such protocol"
            )

    # The length of the last stage: a file of an earlier, shorter run of this folder does not fit.
    trained = [stage.steps for stage in record.stages if stage.index == record.final_stage]
    where, steps = f"{record.path}/spec.json", record.steps
    for found in trained:
        if found > steps or (record.status == "finished" and found != steps):
            raise _damaged(where, f"{found} steps as in stages.jsonl", f"{steps} steps")
    if record.status == "finished" and len(record.stages) != record.final_stage + 1:
        expected = f"{record.final_stage + 1} stages of a finished run"
        raise _damaged(f"{record.path}/stages.jsonl", expected, str(len(record.stages)))


def _damaged(where: str, expected: str, found: str) -> UserError:
    return UserError(f"{where} is damaged or out of date: expected {expected}, found {found}; {REMEDY}")
