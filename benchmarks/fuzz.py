"""Damaged and hostile input for minutes: every failure must be an error of our own.

    python benchmarks/fuzz.py --minutes 5                       # each target
    python benchmarks/fuzz.py --target checkpoint --seed 123/45   # one input again, with its traceback

Writes counts, and the seed and the error of every finding, to `--out`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fraqat import __version__
from fraqat.errors import FraqatError
from fuzz_targets import TARGETS, run_once


@dataclass
class Fuzzed:
    """What a target has been given.

    Args:
        counts: Inputs that were accepted and refused.
        findings: Kind of an unexpected error and where -> the first seed that gave it, and how often it came.
        seconds: Spent.
    """

    counts: Counter[str] = field(default_factory=Counter[str])
    findings: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    seconds: float = 0.0


def fuzz(name: str, seed: int, *, seconds: float = float("inf"), num_inputs: int | None = None) -> Fuzzed:
    """Runs a target on one input after another.

    Args:
        name: Of the target.
        seed: Decides all inputs.
        seconds, num_inputs: When to stop.
    """
    found, start, number = Fuzzed(), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - start < seconds and (num_inputs is None or number < num_inputs):
            one = f"{seed}/{number}"
            try:
                found.counts[run_once(name, one, Path(folder) / "run")] += 1
            except FraqatError as error:
                _note(found, one, error)  # a target has caught those that it expects
            except Exception as error:  # noqa: BLE001  # finding these is the purpose
                _note(found, one, error)
            number += 1
    found.seconds = time.monotonic() - start
    return found


def _note(found: Fuzzed, seed: str, error: Exception) -> None:
    place = traceback.extract_tb(error.__traceback__)[-1]
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fraqat/" in frame.filename]
    where = f"{Path(place.filename).name}:{place.lineno}"
    if ours:
        where += f" from {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    kind = f"{type(error).__name__} at {where}: {str(error)[:100]!r}"
    key = f"{type(error).__name__} at {where}"
    known = next((text for text in found.findings if text.startswith(key)), kind)
    first, count = found.findings.get(known, (seed, 0))
    found.findings[known] = (first, count + 1)


def to_markdown(found: dict[str, Fuzzed], command: str) -> str:
    """A table of counts, and the findings."""
    lines = [
        "# Fuzzing",
        "",
        command,
        "",
        "| target | seconds | inputs | accepted | refused | findings |",
        "| --- " * 6 + "|",
    ]
    for name, one in found.items():
        total = sum(one.counts.values()) + sum(count for _, count in one.findings.values())
        counts = (round(one.seconds), total, one.counts["accepted"], one.counts["refused"], len(one.findings))
        lines.append(f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    for name, one in found.items():
        lines += [f"\n{name}, seed {seed}, {count} times: `{text}`" for text, (seed, count) in one.findings.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fuzzes the targets asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--seed", default="0", help="a number, or SEED/NUMBER of a finding to see it again")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [arguments.target] if arguments.target else list(TARGETS)
    if "/" in arguments.seed:
        with tempfile.TemporaryDirectory() as folder:
            print(run_once(names[0], arguments.seed, Path(folder) / "run"))
        return
    found: dict[str, Fuzzed] = {}
    for name in names:
        found[name] = fuzz(name, int(arguments.seed), seconds=60 * arguments.minutes)
        versions = f"fraqat {__version__}, torch {torch.__version__}, {platform.machine()}, {time.strftime('%Y-%m-%d')}"
        command = f"`python benchmarks/fuzz.py --minutes {arguments.minutes:g} --seed {arguments.seed}`, {versions}."
        text = to_markdown(found, command)
        if arguments.out is not None:
            arguments.out.write_text(text)
        print(text.splitlines()[5 + len(found)], *text.splitlines()[6 + len(found) :], sep="\n", flush=True)
    sys.exit(any(one.findings for one in found.values()))


if __name__ == "__main__":
    main()
