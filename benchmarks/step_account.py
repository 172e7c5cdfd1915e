"""What a distillation step holds at its fullest moment, part by part, for the arms of training_step.py.

    python benchmarks/step_account.py --width 1152 --tokens 1024

Every arm takes one step on fake tensors, which have sizes and no values: no product is computed, so any machine gives the
same account, in seconds, at any size. Counted is every tensor that an operation returns, from its making to its end; not
counted are workspaces inside an operation and what an allocator wastes. Compiled arms cannot be counted so. `ours` is counted
with the kernels for AMX, `ours, portable` with torch's operations. Appends one JSON line per arm to
`docs/results/step_account.jsonl` and rewrites the table beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fraqat import __version__
from fraqat.distill import TrainSpec, checkpoint_blocks_, keep_products, store_weights_
from fraqat.distill.optimizers import DeviceOptimizer
from fraqat.nn import quantized_layers
from fraqat.planning.devices import DeviceKind
from fraqat.planning.fake import TraceRules, new_fake_mode, to_fake
from fraqat.planning.recorder import Category, Phase, StepRecorder
from machine import commit
from training_arms import WAYS, Arm, Work, build

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NAMES = (
    "plain",
    "plain, lean",
    "ours",
    "ours, lean",
    "ours, portable",
    "ours, portable, lean",
    "ours, reference",
    "torchao QAT",
    "torchao QAT, lean",
    "naive fake quantization",
)
BASELINE = "torchao QAT"
PARTS = (
    Category.WEIGHTS,
    Category.TEACHER,
    Category.OPTIMIZER,
    Category.GRADIENTS,
    Category.CODES,
    Category.ACTIVATIONS,
    Category.TEMPORARY,
)


class Account(StepRecorder):
    """Counts what is made of a weight in the forward pass (casts, fake quantization, masks) with the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.fullest: dict[Category, int] = {}
        self.fullest_phase = Phase.SETUP

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if self.phase is not Phase.SETUP and sum(self.totals.values()) > sum(self.fullest.values()):
            self.fullest, self.fullest_phase = dict(self.totals), self.phase
        return output

    def _category(self, func: Any, inputs: list[Tensor]) -> Category:
        found = super()._category(func, inputs)
        known = [self._alive.get(tensor.untyped_storage()._cdata) for tensor in inputs]  # pyright: ignore[reportPrivateUsage]
        is_of_weights = bool(inputs) and all(
            part is None or part.category in (Category.WEIGHTS, Category.CODES) for part in known
        )
        return Category.CODES if found is Category.ACTIVATIONS and is_of_weights else found


@dataclass
class Step:
    """One arm on fake tensors."""

    arm: Arm
    teacher: nn.Module
    optimizer: DeviceOptimizer
    inputs: Tensor
    layouts: list[Tensor]
    uses_autocast: bool

    def forward_and_backward(self, account: Account) -> None:
        """As `Training.step` does it."""
        account.phase = Phase.TEACHER
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.uses_autocast):
            target = self.teacher(self.inputs)
        account.phase = Phase.FORWARD
        with torch.autocast("cpu", torch.bfloat16, enabled=self.uses_autocast):
            loss = F.mse_loss(self.arm.student(self.inputs).float(), target.float())
        del target
        account.phase = Phase.BACKWARD
        loss.backward()


def make_step(name: str, work: Work, mode: FakeTensorMode) -> Step:
    """Everything that is there before a step."""
    is_lean = name.endswith(", lean")
    teacher_dtype = torch.bfloat16 if work.autocast == "bfloat16" else getattr(torch, work.weights)
    with torch.device("meta"):  # a model changes its dtype and its layers while it has no memory at all
        models = build(work).to(teacher_dtype), build(work)
        arm = WAYS[name.removesuffix(", lean").removesuffix(", portable")](models[1])
    teacher = to_fake(models[0], mode)
    integers = getattr(arm.before_update, "__self__", None)
    if integers is None:
        arm = Arm(to_fake(arm.student, mode))
    else:
        student, integers = to_fake((arm.student, integers), mode)
        arm = Arm(student, integers.finish_gradients_)
    weights = [layer.integer for _, layer in quantized_layers(arm.student) if layer.integer is not None]
    for weight in weights:
        weight.has_native_gradients = ", portable" not in name
    with mode, TraceRules(DeviceKind.CPU):
        layouts = [
            torch.empty_like(weight.codes) for weight in weights
        ]  # engines of a CPU keep codes in their order too
        inputs = torch.empty(work.batch, work.tokens, work.width, dtype=teacher_dtype)
        teacher.eval().requires_grad_(False)
        if is_lean:
            store_weights_(teacher, "int8")
            checkpoint_blocks_(arm.student, keep_products, keeps_random_state=False)
    optimizer = DeviceOptimizer(
        list(arm.student.parameters()), TrainSpec(optimizer="adamw_8bit" if is_lean else "adamw")
    )
    return Step(arm, teacher, optimizer, inputs, layouts, work.autocast == "bfloat16")


def account_for(name: str, work: Work) -> dict[str, Any]:
    """Bytes of each part at the fullest moment of a step."""
    account, mode = Account(), new_fake_mode()
    step = make_step(name, work, mode)
    with mode, account, TraceRules(DeviceKind.CPU):
        parameters = list(step.arm.student.parameters())
        account.label([*step.teacher.parameters(), *step.teacher.buffers()], Category.TEACHER)
        account.label([*parameters, *step.arm.student.buffers()], Category.WEIGHTS)
        account.label(_codes(step), Category.CODES)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        step.optimizer.step()  # makes the state
        step.optimizer.zero_grad()
        account.label(step.optimizer.state_tensors(), Category.OPTIMIZER)
        account.label([step.inputs], Category.INPUTS)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: account.label([_gradient(parameter)], Category.GRADIENTS)
            )
        gc.collect()
        step.forward_and_backward(account)
        account.phase = Phase.UPDATE
        step.arm.before_update()
        if not name.endswith(
            ", lean"
        ):  # without a compiler the 8-bit update has many temporaries; with one it has none
            step.optimizer.step()
    parts = {part.value: account.fullest.get(part, 0) for part in PARTS}
    return {
        "benchmark": "step_account",
        "arm": name,
        **asdict(work),
        "parts_bytes": parts,
        "total_bytes": sum(account.fullest.values()),
        "phase": account.fullest_phase.value,
        "torch": torch.__version__,
        "fraqat": __version__,
        "commit": commit(),
    }


def _codes(step: Step) -> Iterable[Tensor]:
    weights = [layer.integer for _, layer in quantized_layers(step.arm.student) if layer.integer is not None]
    return [*(buffer for weight in weights for buffer in weight.buffers()), *step.layouts]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def write_table(path: Path) -> None:
    """Rewrites the table from all lines, the newest of every arm and work."""
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        title = (
            f"{record['blocks']} blocks of width {record['width']}, {record['batch']} x {record['tokens']} tokens, "
            f"{record['weights']} weights"
        )
        title += ", no autocast" if record["autocast"] == "none" else ""
        newest.setdefault(title, {})[record["arm"]] = record
    parts = [
        "# What a distillation step holds\n\nMade by `benchmarks/step_account.py`: MiB of all tensors at the fullest moment "
        "of a step, by what they are for. Weights, teacher and\noptimizer state are there at every moment, alike in every "
        "arm of the same settings. `codes` also has what fake quantization and autocast\nmake of weights; `working` is what "
        "the backward pass has in hand. `of torchao` is over torchao's QAT with default settings, `alike` over\nits arm of "
        "the same settings. `least` is what would be left of the total, over torchao, with no codes, activations and "
        "temporaries\nat all, but with every gradient in float32, as clipping the norm of the whole gradient needs."
    ]
    for title, records in newest.items():
        parts.append(f"## {title}\n\n" + "\n".join(_rows(records)))
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def _rows(records: dict[str, dict[str, Any]]) -> list[str]:
    head = [
        "arm",
        *(part.value for part in PARTS[:-1]),
        "working",
        "total",
        "fullest in",
        "of torchao",
        "alike",
        "least",
    ]
    rows = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name in NAMES:
        if (record := records.get(name)) is None:
            continue
        parts = record["parts_bytes"]
        baseline = records.get(BASELINE)
        alike = records.get(BASELINE + (", lean" if name.endswith(", lean") else ""))
        least = sum(parts[part.value] for part in PARTS[:3]) + parts[Category.WEIGHTS.value]
        cells = [name, *(f"{parts[part.value] / 2**20:.0f}" for part in PARTS), f"{record['total_bytes'] / 2**20:.0f}"]
        cells += [record["phase"], _over(record["total_bytes"], baseline), _over(record["total_bytes"], alike)]
        cells += [_over(least, baseline) if name.startswith("ours") else ""]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _over(num_bytes: int, other: dict[str, Any] | None) -> str:
    return "" if other is None else f"{num_bytes / other['total_bytes']:.2f}"


def main() -> None:
    """Counts the arms and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="of the student")
    parser.add_argument("--autocast", choices=("bfloat16", "none"), default="bfloat16")
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--out", type=Path, default=RESULTS / "step_account.jsonl")
    arguments = parser.parse_args()
    work = Work(
        arguments.width, arguments.tokens, arguments.batch, arguments.blocks, arguments.weights, arguments.autocast
    )
    records: list[dict[str, Any]] = []
    for name in arguments.arms:
        records.append(account_for(name, work))
        print(f"{name:35} {records[-1]['total_bytes'] / 2**20:.0f} MiB, fullest in {records[-1]['phase']}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    write_table(arguments.out)


if __name__ == "__main__":
    main()
