"""Faults of machines, done for real to a small training run: does it end with the weights of the undisturbed run?

Every trial is a process of its own that trains `fault_child.py`'s network through all nine widths with checkpoints, dropout and
an average of the weights, is disturbed, and is started again with the same settings until it ends. Outcomes: `equal`, the run
ended with the same bytes in `student.safetensors`; `stopped`, it ended with its own exit code and a message that says what to
do, and afterwards a run without the fault ended equal; `broken`, anything else. Prints a table; `--out` writes it.

    python benchmarks/faults.py --trials 20 --out docs/results/faults.md
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fault_trials import BROKEN, EQUAL, FAULTS, STOPPED, Lab, Outcome
from fraqat import __version__
from fraqat.table import Table


def run_fault(lab: Lab, name: str, trials: int, say: Callable[[str], None] = lambda text: None) -> list[Outcome]:
    """Makes the trials of one fault."""
    trial, share = FAULTS[name]
    outcomes: list[Outcome] = []
    for _ in range(max(1, round(trials * share))):
        outcomes.append(trial(lab))
        if outcomes[-1].kind == BROKEN:
            say(f"BROKEN: {name}: {outcomes[-1].text}")
    return outcomes


def to_table(found: Mapping[str, list[Outcome]], note: str) -> Table:
    """A row for every fault."""
    rows: list[tuple[Any, ...]] = []
    for name, outcomes in found.items():
        counts = Counter(outcome.kind for outcome in outcomes)
        rows.append((name, len(outcomes), counts[EQUAL], counts[STOPPED], counts[BROKEN]))
    columns = ("fault", "trials", "ended equal", "stopped with a message, then equal", "broken")
    return Table("Faults", columns, tuple(rows), (note,))


def to_markdown(table: Table, found: Mapping[str, list[Outcome]]) -> str:
    """The table, and one message of each fault that stops a run."""
    lines = [
        "# Faults",
        "",
        table.notes[0],
        "",
        "| " + " | ".join(table.columns) + " |",
        "| --- " * len(table.columns) + "|",
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in table.to_cells()]
    lines += ["", "What a stopped run says, one of each:", ""]
    for name, outcomes in found.items():
        said = next((outcome.text for outcome in outcomes if outcome.kind == STOPPED), None)
        if said:
            lines.append(f"- {name}: `{' '.join(said.split())}`")
    saves = Counter(outcome.text for outcome in found.get("kill -9 during a save", []))
    lines += ["", f"Of the kills aimed at a save: {', '.join(f'{count} {text}' for text, count in saves.items())}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the faults and writes the table after each, so that an interrupted run leaves what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of a fault's name")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.monotonic()
    found: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), arguments.seed)
        for name in FAULTS:
            if arguments.only is not None and arguments.only not in name:
                continue
            found[name] = run_fault(lab, name, arguments.trials, lambda text: print(text, flush=True))
            span = time.monotonic() - start
            print(f"{name}: {dict(Counter(outcome.kind for outcome in found[name]))}, after {span:.0f} s", flush=True)
            command = f"`python benchmarks/faults.py --trials {arguments.trials} --seed {arguments.seed}`"
            versions = f"fraqat {__version__}, torch {torch.__version__}, {platform.machine()}"
            note = f"{command}, {time.strftime('%Y-%m-%d')}, {versions}, {span:.0f} s."
            table = to_table(found, note)
            if arguments.out is not None:
                arguments.out.write_text(to_markdown(table, found).replace(folder, "FOLDER"))
    print(table)


if __name__ == "__main__":
    main()
