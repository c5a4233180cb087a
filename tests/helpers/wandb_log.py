"""Read the records that wandb writes to run-ID.wandb, as `wandb sync` does."""

import struct
import time
from pathlib import Path

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_records(path: Path) -> list:
    """The records of a file in LevelDB's log format: chunks of (checksum, length, kind, bytes) in blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = path.read_bytes(), HEADER, b"", []
    assert data[:4] in (b"", b":W&B")
    while at + HEADER <= len(data):  # the last chunk may be half written
        if (left := BLOCK - at % BLOCK) < HEADER:  # the end of a block is filled with zeros
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        assert kind in (FULL, FIRST, MIDDLE, LAST), kind
        at += HEADER + length
        if at > len(data):
            break
        parts += data[at - length : at]
        if kind in (FULL, LAST):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def finished_records(path: Path, seconds: float = 60.0) -> list:
    """The records of a run that has ended. wandb's own process writes the last ones a moment after the run's end."""
    end = time.monotonic() + seconds
    while not (records := wandb_records(path)) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, f"{path} has {len(records)} records and no end after {seconds} s"
        time.sleep(0.1)
    return records
