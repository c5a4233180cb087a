"""The metrics of a run, metrics.jsonl: one JSON object per line, each with its `step`. Torch-free."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinalrm_align.train.durable import flush, write_atomically
from dinalrm_align.train.files import parse_json, read_text

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends rows to metrics.jsonl and keeps the digest of the file."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Keep the first `keep` bytes of an existing file: a resumed run writes the later rows again."""
        self.path = path
        kept = path.read_bytes()[:keep] if keep else b""
        write_atomically(path, kept)
        self._bytes, self._digest = len(kept), hashlib.sha256(kept)

    def append(self, row: Mapping[str, float]) -> None:
        line = (json.dumps(row) + "\n").encode()
        with open(self.path, "ab") as file:
            file.write(line)
        self._bytes += len(line)
        self._digest.update(line)

    def mark(self) -> dict[str, Any]:
        """Flush the file to disk; returns its size and digest, which a checkpoint stores."""
        flush(self.path)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line cut short by a crash; ValueError for any other bad line."""
    *lines, _ = read_text(path, "file of metrics").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{where}: got {line!r:.80}; expected an object of metrics with its step")
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{where}: {name}: got {value!r:.80}; expected a number")
        rows.append(row)
    return rows
