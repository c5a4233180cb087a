"""Read the records that wandb writes to run-ID.wandb, as `wandb sync` does."""

import struct
from pathlib import Path

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_records(path: Path) -> list:
    """The records of a file in LevelDB's log format: chunks of (checksum, length, kind, bytes) in blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = path.read_bytes(), HEADER, b"", []
    assert data[:4] == b":W&B"
    while at < len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:  # the end of a block is filled with zeros
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        assert kind in (FULL, FIRST, MIDDLE, LAST), kind
        at += HEADER + length
        parts += data[at - length : at]
        if kind in (FULL, LAST):
            records.append(Record.FromString(parts))
            parts = b""
    return records
