"""Damaged and hostile input for minutes: every failure must be an error of our own.

    python benchmarks/fuzz.py --minutes 5                       # each target
    python benchmarks/fuzz.py --target checkpoint --seed 123/45   # one input again, with its traceback

Adds counts, and the seed and the error of every finding, to `--out`.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fraqat import __version__
from fraqat.errors import FraqatError
from fuzz_targets import TARGETS, run_once
from machine import commit

INPUT_LIMIT_S = 60.0
"""An input that takes longer is a finding: a count in a damaged file that is believed, for example."""


class TooSlowError(Exception):
    """An input took longer than `INPUT_LIMIT_S`."""


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
    with tempfile.TemporaryDirectory() as folder, _alarm():
        while time.monotonic() - start < seconds and (num_inputs is None or number < num_inputs):
            one = f"{seed}/{number}"
            signal.setitimer(signal.ITIMER_REAL, INPUT_LIMIT_S)
            try:
                found.counts[run_once(name, one, Path(folder) / "run")] += 1
            except FraqatError as error:
                _note(found, one, error)  # a target has caught those that it expects
            except Exception as error:  # noqa: BLE001  # finding these is the purpose
                _note(found, one, error)
            number += 1
    found.seconds = time.monotonic() - start
    return found


@contextmanager
def _alarm() -> Generator[None]:
    def stop(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {INPUT_LIMIT_S:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


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


def to_record(name: str, one: Fuzzed, seed: int) -> dict[str, Any]:
    """One line of `fuzzing.jsonl`."""
    total = sum(one.counts.values()) + sum(count for _, count in one.findings.values())
    return {
        "benchmark": "fuzz",
        "target": name,
        "seed": seed,
        "seconds": round(one.seconds),
        "inputs": total,
        "accepted": one.counts["accepted"],
        "refused": one.counts["refused"],
        "findings": [{"seed": first, "times": count, "text": text} for text, (first, count) in one.findings.items()],
        "date": time.strftime("%Y-%m-%d"),
        "version": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "commit": commit(),
    }


def to_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A table of the newest counts of every target, and the findings of each of its runs."""
    newest = {record["target"]: record for record in records}
    lines = [
        "# Fuzzing",
        "",
        "Written by `benchmarks/fuzz.py`, whose targets say what is fed and must hold; every record is in `fuzzing.jsonl`.",
        "",
        "| target | seconds | inputs | accepted | refused | findings | commit |",
        "| --- " * 7 + "|",
    ]
    for name in TARGETS:
        if name in newest:
            one = newest[name]
            counts = (one["seconds"], one["inputs"], one["accepted"], one["refused"], len(one["findings"]))
            lines.append(f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + f" | {one['commit']} |")
    found = [(record, finding) for record in records for finding in record["findings"]]
    if found:
        lines += ["", "Findings of these and earlier runs:", ""]
    for record, finding in found:
        where = f"{record['target']}, commit {record['commit']}, seed {finding['seed']}, {finding['times']} times"
        lines.append(f"- {where}: `{finding['text']}`")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fuzzes the targets asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--seed", default="0", help="a number, or SEED/NUMBER of a finding to see it again")
    parser.add_argument(
        "--out", type=Path, help="a .jsonl file to which records are added; the table lies beside it as .md"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [arguments.target] if arguments.target else list(TARGETS)
    if "/" in arguments.seed:
        with tempfile.TemporaryDirectory() as folder:
            print(run_once(names[0], arguments.seed, Path(folder) / "run"))
        return
    records: list[dict[str, Any]] = []
    for name in names:
        one = fuzz(name, int(arguments.seed), seconds=60 * arguments.minutes)
        records.append(to_record(name, one, int(arguments.seed)))
        print(json.dumps(records[-1]), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as stream:
                stream.write(json.dumps(records[-1]) + "\n")
            known = [json.loads(line) for line in arguments.out.read_text().splitlines()]
            arguments.out.with_suffix(".md").write_text(to_markdown(known))
    sys.exit(any(record["findings"] for record in records))


if __name__ == "__main__":
    main()
