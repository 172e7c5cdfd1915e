"""Faults of machines, done for real to a small training run: does it end with the weights of the undisturbed run?

Every trial is a process of its own that trains `fault_child.py`'s network through all nine widths with checkpoints, dropout and
an average of the weights, is disturbed, and is started again with the same settings until it ends. Outcomes: `equal`, the run
ended with the same bytes in `student.safetensors`; `stopped`, it ended with its own exit code and a message that says what to
do, and afterwards a run without the fault ended equal; `broken`, anything else. Prints a table.

    python benchmarks/faults.py --trials 20 --out docs/results/faults.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fault_lab import BROKEN, EQUAL, STOPPED, Lab, Outcome
from fault_trials import FAULTS as ONE_PROCESS_FAULTS
from fault_workers import WORKER_FAULTS
from fraqat import __version__
from fraqat.distill.checkpoint import FORMAT_VERSION
from fraqat.table import Table
from machine import commit

FAULTS = {**ONE_PROCESS_FAULTS, **WORKER_FAULTS}


def run_fault(lab: Lab, name: str, trials: int, say: Callable[[str], None] = lambda text: None) -> list[Outcome]:
    """Makes the trials of one fault."""
    trial, share = FAULTS[name]
    outcomes: list[Outcome] = []
    for _ in range(max(1, round(trials * share))):
        outcomes.append(trial(lab))
        if outcomes[-1].kind == BROKEN:
            say(f"BROKEN: {name}: {outcomes[-1].text}")
    return outcomes


def to_record(name: str, outcomes: list[Outcome], seconds: float, seed: int) -> dict[str, Any]:
    """One line of `faults.jsonl`."""
    texts = Counter(outcome.text for outcome in outcomes if outcome.kind != STOPPED)
    said = next((" ".join(outcome.text.split()) for outcome in outcomes if outcome.kind == STOPPED), None)
    return {
        "benchmark": "faults",
        "fault": name,
        "seed": seed,
        **{kind: sum(outcome.kind == kind for outcome in outcomes) for kind in (EQUAL, STOPPED, BROKEN)},
        "said": said,
        "notes": dict(texts) if any(texts) else {},
        "seconds": round(seconds),
        "date": time.strftime("%Y-%m-%d"),
        "version": __version__,
        "torch": torch.__version__,
        "commit": commit(),
        "checkpoint_format": FORMAT_VERSION,
        "machine": platform.machine(),
    }


def to_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A row for every fault, from its newest record."""
    newest = {record["fault"]: record for record in records}
    rows: list[tuple[Any, ...]] = []
    for name in FAULTS:
        if name in newest:
            counts = [newest[name][kind] for kind in (EQUAL, STOPPED, BROKEN)]
            rows.append((name, sum(counts), *counts, newest[name]["commit"]))
    columns = ("fault", "trials", "ended equal", "stopped with a message, then equal", "broken", "commit")
    return Table("Faults", columns, tuple(rows))


def to_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The table, and one message of each fault that stops a run."""
    table, newest = to_table(records), {record["fault"]: record for record in records}
    lines = [
        "# Faults",
        "",
        "Written by `benchmarks/faults.py`, which says what is counted; every record is in `faults.jsonl`. Each trial is a",
        "training run of a small network through all nine widths, disturbed and started again.",
        "",
    ]
    lines += ["| " + " | ".join(table.columns) + " |", "| --- " * len(table.columns) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table.to_cells()]
    lines += ["", "What a stopped run says, one of each:", ""]
    lines += [f"- {name}: `{newest[name]['said']}`" for name in FAULTS if name in newest and newest[name]["said"]]
    lines += ["", "More about the trials:", ""]
    for name in FAULTS:
        if name in newest and newest[name]["notes"]:
            notes = ", ".join(f"{text} {count} times" for text, count in newest[name]["notes"].items())
            lines.append(f"- {name}: {notes}")
    origins = {
        (record["commit"], record["checkpoint_format"], record["torch"], record["date"]) for record in newest.values()
    }
    lines += [""]
    lines += [
        f"Commit {commit}, checkpoint format {version}, torch {torch_version}, {date}."
        for commit, version, torch_version, date in sorted(origins)
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the faults, and writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="parts of names of faults")
    parser.add_argument(
        "--out", type=Path, help="a .jsonl file to which records are added; the table lies beside it as .md"
    )
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    if arguments.out is not None and arguments.out.exists():
        records = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), arguments.seed)
        for name in FAULTS:
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            start = time.monotonic()
            outcomes = run_fault(lab, name, arguments.trials, lambda text: print(text, flush=True))
            records.append(to_record(name, outcomes, time.monotonic() - start, arguments.seed))
            line = json.dumps(records[-1]).replace(folder, "FOLDER")
            print(line, flush=True)
            if arguments.out is not None:
                with arguments.out.open("a") as stream:
                    stream.write(line + "\n")
                known = [json.loads(line) for line in arguments.out.read_text().splitlines()]
                arguments.out.with_suffix(".md").write_text(to_markdown(known))
    print(to_table(records))


if __name__ == "__main__":
    main()
