"""Counters of the server in Prometheus's text format (https://prometheus.io/docs/instrumenting/exposition_formats)."""

import threading
from collections import Counter

HELP = {
    "dinalrm_requests_total": "counter Requests to score, by path and status.",
    "dinalrm_errors_total": "counter Requests answered with a status of 400 or more.",
    "dinalrm_batch_size": "summary Samples scored together.",
    "dinalrm_queue_seconds": "summary Seconds that the oldest sample of a batch waited.",
    "dinalrm_waiting": "gauge Samples in the queues.",
}


class Metrics:
    """Thread-safe counters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def answered(self, path: str, status: int) -> None:
        with self._lock:
            self._values[f'dinalrm_requests_total{{path="{path}",status="{status}"}}'] += 1
            self._values["dinalrm_errors_total"] += status >= 400

    def batch(self, size: int, seconds: float) -> None:
        with self._lock:
            for name, value in (("dinalrm_batch_size", size), ("dinalrm_queue_seconds", seconds)):
                self._values[f"{name}_sum"] += value
                self._values[f"{name}_count"] += 1

    def text(self, waiting: int) -> str:
        with self._lock:
            values = {**self._values, "dinalrm_waiting": waiting}
        lines = []
        for name, meaning in HELP.items():
            kind, _, words = meaning.partition(" ")
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
            lines += [f"{key} {value:.9g}" for key, value in sorted(values.items()) if key.startswith(name)]
        return "\n".join(lines) + "\n"
