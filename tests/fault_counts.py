"""How many faults the tests make that damage models, flip bits of kept pages, and kill processes:
FAULTS times as many as usual (`make faults`). The first are always the same.
"""

from __future__ import annotations

import os

TIMES = int(os.environ.get("FAULTS", "1"))
