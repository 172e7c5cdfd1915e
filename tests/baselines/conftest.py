"""The toy family of tests/distill, and tests/distill/toy.py on the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
