"""Every recipe on weights of true size: `FULL_SIZE_WEIGHTS=DIR pytest -m full tests/full_size`, 21 GB in DIR."""

import os
from pathlib import Path

import pytest
from full_size.rehearsal import error, main

ROWS = 12


@pytest.mark.full
def test_every_recipe_runs_at_full_size_within_the_predicted_memory():
    """Finished rows are kept in DIR/rehearsal, so that a second call continues."""
    weights = Path(os.environ["FULL_SIZE_WEIGHTS"])
    rows = main(["--weights", str(weights), "--output_dir", str(weights / "rehearsal")])["rows"]
    assert len(rows) == ROWS and {name: row["status"] for name, row in rows.items() if row["status"]} == {}
    off = {name: error(row, "private" if row["t5"] else "resident") for name, row in rows.items()}
    assert {name: value for name, value in off.items() if abs(value) > 10} == {}
