"""`import dinalrm_align` is free: no torch, no diffusers, well under half a second."""

import os
import subprocess
import sys

import pytest
from paths import ROOT


def python(code: str) -> list[str]:
    """Run the code in a new process; return the words that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


def test_import_is_fast_and_without_torch():
    seconds, *loaded = python(
        "import sys, time; start = time.process_time(); import dinalrm_align; "
        "print(time.process_time() - start, *(name in sys.modules for name in ('torch', 'diffusers', 'numpy')))"
    )
    assert float(seconds) < 0.5
    assert loaded == ["False", "False", "False"]


@pytest.mark.parametrize(
    "use",
    [
        "from dinalrm_align import RewardConfig; RewardConfig()",
        "from dinalrm_align.models.specs import resolve_model; resolve_model('auto')",
        "import dinalrm_align.reward.names",
    ],
)
def test_light_uses_load_no_torch(use):
    assert python(f"import sys; {use}; print('torch' in sys.modules)") == ["False"]
