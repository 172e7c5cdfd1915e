"""The targets of `fuzz.py` guided by coverage, where atheris (libFuzzer for Python) is installed.

    python benchmarks/fuzz_coverage.py checkpoint -max_total_time=300 -rss_limit_mb=0 -len_control=0 -max_len=512

libFuzzer's bytes decide what the target's random generator would: inputs that reach new lines of fraqat are kept and changed
further. Ends at the first exception that is no error of ours; its bytes are in a file `crash-...`.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import atheris as _atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

atheris: Any = _atheris

with atheris.instrument_imports(include=["fraqat"]):
    from fuzz_inputs import BytesRandom
    from fuzz_targets import TARGETS, run_once


def main() -> None:
    """Fuzzes the target named first; the other arguments are libFuzzer's."""
    name = sys.argv.pop(1)
    if name not in TARGETS:
        sys.exit(f"{name} is no target: {', '.join(TARGETS)}")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:

        def test_one_input(data: bytes) -> None:
            run_once(name, BytesRandom(data), Path(folder) / "run")

        atheris.Setup(sys.argv, test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
