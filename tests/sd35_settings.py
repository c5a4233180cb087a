"""Write recipes/sd35_settings.md: every setting of the recipes for SD3.5, with its source.

python tests/sd35_settings.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from settings_table import TABLE, text  # noqa: E402

if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
    print(TABLE)
