"""Several ranks: their timeout, and the error when one is lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs


def waiting(minutes: float) -> InitProcessGroupKwargs:
    """For `Accelerator(kwargs_handlers=[...])`: the timeout of collectives, which detects a rank that hangs."""
    return InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))


@contextmanager
def with_others() -> Iterator[None]:
    """Turn a failed collective within the block into ConnectionError (an OSError): a rank failed or timed out."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one; gloo raises it bare
        first_line = str(error).strip().split("\n")[0]
        raise ConnectionError(
            f"another process was lost: it failed or exceeded loop.timeout; see its output ({first_line:.200})"
        ) from error
