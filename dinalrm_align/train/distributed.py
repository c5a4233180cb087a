"""Several processes as one run: how long they wait for each other, and what is said when one is lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs


def waiting(minutes: float) -> InitProcessGroupKwargs:
    """For `Accelerator(kwargs_handlers=[...])`: a process that waits longer for the others fails, and with it the run.

    A process that dies is noticed at once by gloo and by the launcher; one that hangs, and NCCL's, by this alone.
    """
    return InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))


@contextmanager
def with_others() -> Iterator[None]:
    """Around what all processes do together: ConnectionError, an OSError, when one of them is gone or does not come."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one; gloo raises it bare
        first_line = str(error).strip().split("\n")[0]
        raise ConnectionError(
            f"another process was lost, or did not come within loop.timeout; look at its output ({first_line:.200})"
        ) from error
