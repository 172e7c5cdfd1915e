"""How far is the planner from real training steps? Peak memory and time of the trainer, in fresh processes on the CPU.

Each case builds a model of a real class with random weights and trains three steps with `fraqat.distill.Distiller`, with a
validation after the second. Measured is the process' largest resident set from the second step on, less that of the same
process after steps of a one-block model of the same width (libraries, code, threads). malloc returns freed memory at once, so
that the resident set follows the tensors. Time is the CPU time of another fresh process on one thread, which its neighbours
disturb least; the plan uses rates measured in the same process. Prints a table and appends one JSON line per case.

    python benchmarks/planner_error.py --out docs/results/planner_error.jsonl
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fraqat import ScheduleSpec, __version__
from fraqat.distill import Batch, Distiller, LossSpec, TeacherSpec, TrainSpec
from fraqat.kernels import EngineName
from fraqat.nn import EngineSpec, quantize_
from fraqat.planning import Device, DeviceKind, Plan, Workload, measure_device, plan_training, squared_error
from fraqat.schedules import ScheduleKind
from fraqat.table import Table
from fraqat.tasks.known import build_on_meta, describe_model
from fraqat.zoo import zoo_path

NUM_STEPS = 3
MEMORY_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}
TIME_SETTINGS = {"OMP_NUM_THREADS": "1"}
_MIB = 2**20
_TEXT, _WIDTH = 77, 768


@dataclass(frozen=True)
class Case:
    """One model and one way to train it.

    Args:
        class_name, config: Of the model.
        shrink: Changes of the configuration that leave one block.
        shapes: Inputs by name, without the batch axis; `input_ids` are integers, every other one floats.
        batch_size, accumulation, autocast, ema_decay, validate_every: As in `TrainSpec`.
        options: Further fields of `TrainSpec`.
    """

    class_name: str
    config: Mapping[str, Any]
    shrink: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    batch_size: int = 4
    accumulation: int = 1
    autocast: str = "bfloat16"
    ema_decay: float | None = None
    validate_every: int = 2
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def train(self) -> TrainSpec:
        """The trainer's settings."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("batch_size", "accumulation", "autocast")}
        values |= {"ema_decay": self.ema_decay, "validate_every": self.validate_every, **self.options}
        return TrainSpec(**values, tensorboard=False)

    def inputs(self, num_samples: int) -> dict[str, Tensor]:
        """A random batch."""
        batch: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            if name == "input_ids":
                batch[name] = torch.randint(0, self.config["vocab_size"], (num_samples, *shape))
            else:
                batch[name] = torch.rand(num_samples, *shape)
        return batch


SD3 = Case(
    "SD3Transformer2DModel",
    {
        "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 4, "attention_head_dim": 64,
        "num_attention_heads": 12, "joint_attention_dim": _WIDTH, "caption_projection_dim": 768,
        "pooled_projection_dim": 512, "pos_embed_max_size": 32, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
    },
    {"num_layers": 1, "dual_attention_layers": [0]},
    {
        "hidden_states": (16, 24, 24), "encoder_hidden_states": (_TEXT, _WIDTH), "pooled_projections": (512,),
        "timestep": (),
    },
)  # fmt: skip
SANA = Case(
    "SanaTransformer2DModel",
    {
        "in_channels": 32, "out_channels": 32, "num_attention_heads": 18, "attention_head_dim": 32, "num_layers": 6,
        "num_cross_attention_heads": 8, "cross_attention_head_dim": 72, "cross_attention_dim": 576,
        "caption_channels": _WIDTH, "mlp_ratio": 2.5, "sample_size": 16, "patch_size": 1,
    },
    {"num_layers": 1},
    {"hidden_states": (32, 16, 16), "encoder_hidden_states": (_TEXT, _WIDTH), "timestep": ()},
    batch_size=8,
)  # fmt: skip
PIXART = Case(
    "PixArtTransformer2DModel",
    {
        "sample_size": 32, "num_layers": 8, "attention_head_dim": 64, "num_attention_heads": 8, "in_channels": 4,
        "out_channels": 8, "patch_size": 2, "cross_attention_dim": 512, "caption_channels": _WIDTH,
        "use_additional_conditions": False,
    },
    {"num_layers": 1},
    {"hidden_states": (4, 32, 32), "encoder_hidden_states": (_TEXT, _WIDTH), "timestep": ()},
)  # fmt: skip
FLUX = Case(
    "FluxTransformer2DModel",
    {
        "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64,
        "num_attention_heads": 10, "joint_attention_dim": _WIDTH, "pooled_projection_dim": 256, "guidance_embeds": False,
        "axes_dims_rope": [16, 24, 24],
    },
    {"num_layers": 1, "num_single_layers": 1},
    {
        "hidden_states": (144, 64), "encoder_hidden_states": (_TEXT, _WIDTH), "pooled_projections": (256,),
        "timestep": (),
    },
)  # fmt: skip
GEMMA = Case(
    "Gemma2ForCausalLM",
    {
        "vocab_size": 8192, "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 80, "query_pre_attn_scalar": 80, "model_type": "gemma2",
    },
    {"num_hidden_layers": 1},
    {"input_ids": (192,)},
)  # fmt: skip
_ZOO = describe_model(str(zoo_path("color-digits-sana")))
ZOO = Case(
    _ZOO.class_name,
    _ZOO.config,
    {"num_layers": 1},
    {"hidden_states": (8, 8, 8), "encoder_hidden_states": (16, 64), "timestep": ()},
)

LEAN = {
    "activation_checkpointing": "blocks",
    "teacher": TeacherSpec("int8"),
    "optimizer": "adamw_8bit",
}

CASES: Mapping[str, Case] = {
    "sd3": SD3,
    "sd3, float32": dataclasses.replace(SD3, autocast="none"),
    "sana": SANA,
    "sana, one sample": dataclasses.replace(SANA, batch_size=1),
    "pixart": PIXART,
    "pixart, 8 parts": dataclasses.replace(PIXART, batch_size=8, accumulation=8),
    "pixart, blocks": dataclasses.replace(PIXART, options={"activation_checkpointing": "blocks"}),
    "pixart, lean": dataclasses.replace(PIXART, options=LEAN),
    "pixart, fake": dataclasses.replace(PIXART, options={"engine": EngineSpec(EngineName.REFERENCE)}),
    "flux": FLUX,
    "flux, averaged": dataclasses.replace(FLUX, ema_decay=0.99),
    "gemma2": GEMMA,
    "gemma2, 2 parts": dataclasses.replace(GEMMA, batch_size=4, accumulation=2),
    "zoo:color-digits-sana, 64": dataclasses.replace(ZOO, batch_size=64),
    "zoo:color-digits-sana, 256": dataclasses.replace(ZOO, batch_size=256),
}


class _EnoughError(Exception):
    """Ends a run after the steps that were wanted."""


class _Stream:
    def __init__(self, case: Case, batch_size: int):
        self.case, self.batch_size = case, batch_size

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.case.inputs(self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class _Task:
    """The least that a `Distiller` needs."""

    def __init__(self, case: Case):
        self.case = case

    def train_stream(self, batch_size: int, seed: int) -> _Stream:
        return _Stream(self.case, batch_size)

    def steps_per_epoch(self, batch_size: int) -> int:
        return 1

    def validation_batches(self, batch_size: int) -> list[Batch]:
        return [self.case.inputs(batch_size)]

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        return []

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        return batch

    def predict(self, model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
        return predict(model, inputs)

    def loss(self, student: Any, teacher: Any, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        return squared_error(student, teacher, inputs)


def predict(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """One forward pass, attention by plain products as the diffusion task has it on a CPU."""
    values: dict[str, Any] = dict(inputs)
    if "input_ids" in values:
        return {"logits": model(**values, use_cache=False).logits}
    if type(model).__name__.startswith("Flux"):
        values["img_ids"] = torch.zeros(values["hidden_states"].shape[1], 3)
        values["txt_ids"] = torch.zeros(values["encoder_hidden_states"].shape[1], 3)
    with sdpa_kernel(SDPBackend.MATH):
        return {"output": model(**values, return_dict=False)[0]}


def build(case: Case, changes: Mapping[str, Any]) -> nn.Module:
    """The model with random weights."""
    config = {**case.config, **changes}
    if hasattr(diffusers, case.class_name):
        return getattr(diffusers, case.class_name).from_config(
            {key: value for key, value in config.items() if not key.startswith("_")}
        )
    model_class = getattr(transformers, case.class_name)
    return model_class(model_class.config_class.from_dict(config))


def train(case: Case, changes: Mapping[str, Any], on_step: Callable[[int], None]) -> None:
    """Trains until `on_step` says that it is enough."""
    teacher = build(case, changes)
    student = copy.deepcopy(teacher)
    quantize_(student)
    count = 0

    def after_step(record: object) -> None:
        nonlocal count
        count += 1
        on_step(count)
        if count == NUM_STEPS:
            raise _EnoughError

    with tempfile.TemporaryDirectory() as folder:
        schedule = ScheduleSpec(ScheduleKind.CONSTANT).resolve(4.0, 10)
        distiller = Distiller(_Task(case), teacher, student, schedule, case.train, Path(folder), on_step=after_step)
        try:
            distiller.run()
        except _EnoughError:
            return


def measure_memory(case: Case) -> dict[str, Any]:
    """Largest resident set of real steps in this process, less that of small ones."""
    of_one_block = {key: value for key, value in case.options.items() if key != "activation_checkpointing"}
    small = dataclasses.replace(case, batch_size=case.accumulation, options=of_one_block)
    train(small, case.shrink, lambda step: None)
    gc.collect()
    baseline = _status_bytes("VmRSS")

    def on_step(step: int) -> None:
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident set so far

    train(case, {}, on_step)
    return {"measured_bytes": _status_bytes("VmHWM") - baseline, "baseline_bytes": baseline}


def measure_time(case: Case) -> dict[str, Any]:
    """CPU time of real steps in this process, and the processor's rates before and after them."""
    device = measure_device(time.process_time)
    ends: list[float] = []
    without_validation = dataclasses.replace(case, validate_every=NUM_STEPS)
    train(without_validation, {}, lambda step: ends.append(time.process_time()))
    again = measure_device(time.process_time)
    return {
        "measured_step_s": min(after - before for before, after in itertools.pairwise(ends)),
        "bytes_per_s": max(device.bytes_per_s, again.bytes_per_s),
        "operation_s": min(device.operation_s, again.operation_s),
        "flops_per_s": {name: max(rate, again.flops_per_s[name]) for name, rate in device.flops_per_s.items()},
    }


def plan(case: Case, measured: Mapping[str, Any]) -> Plan:
    """The planner's answer for the machine that was measured."""
    rates: dict[str, Any] = {name: measured[name] for name in ("bytes_per_s", "operation_s", "flops_per_s")}
    device = Device("measured", DeviceKind.CPU, 2**40, **rates, link_bytes_per_s=1.0)
    student = build_on_meta(case.class_name, case.config)
    quantize_(student)
    return plan_training(Workload(student, predict, case.inputs), case.train, 1, device)


def run_case(name: str) -> dict[str, Any]:
    """One case: measured in a fresh process, planned in this one."""
    measured = {**_in_fresh_process("memory", name, MEMORY_SETTINGS), **_in_fresh_process("time", name, TIME_SETTINGS)}
    start = time.process_time()
    planned = plan(CASES[name], measured)
    return {
        "benchmark": "planner_error",
        "case": name,
        "num_parameters": planned.num_parameters,
        "planned_bytes": planned.memory.num_bytes,
        "planned_parts": dict(planned.memory.parts),
        "planned_phase": planned.memory.phase.value,
        "planned_step_s": planned.step_s,
        "planning_s": time.process_time() - start,
        **measured,
        "fraqat": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
        "commit": _commit(),
    }


def _in_fresh_process(what: str, name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--measure", what, "--case", name]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def to_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Planned against measured."""
    rows = tuple(
        (
            record["case"],
            record["num_parameters"] / 1e6,
            record["planned_bytes"] / _MIB,
            record["measured_bytes"] / _MIB,
            record["planned_bytes"] / record["measured_bytes"],
            record["planned_step_s"],
            record["measured_step_s"],
            record["planned_step_s"] / record["measured_step_s"],
        )
        for record in records
    )
    columns = (
        "case",
        "parameters, M",
        "planned, MiB",
        "measured, MiB",
        "ratio",
        "planned, s",
        "measured, s",
        "ratio of s",
    )
    return Table("Planned and measured training steps", columns, rows)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines, one per case")
    parser.add_argument("--case", dest="cases", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--measure", choices=["memory", "time"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure = measure_memory if arguments.measure == "memory" else measure_time
        print(json.dumps(measure(CASES[arguments.cases[0]])))
        return
    records: list[dict[str, Any]] = []
    for name in arguments.cases or CASES:
        records.append(run_case(name))
        print(to_table(records[-1:]), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(records[-1]) + "\n")
    print(to_table(records))


if __name__ == "__main__":
    main()
