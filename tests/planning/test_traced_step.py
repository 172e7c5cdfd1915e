"""Laws of one step on fake tensors."""

from __future__ import annotations

import dataclasses
import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy_workload import (
    HIDDEN,
    LENGTH,
    NUM_BLOCKS,
    WIDTH,
    GatedBlock,
    ToyNetwork,
    make_student,
    make_workload,
    num_parameters,
    predict,
)

from fraqat.distill import TeacherSpec, TrainSpec
from fraqat.kernels import blocks
from fraqat.nn import ActivationSpec, EngineSpec, QuantSpec, quantize_, quantized_layers
from fraqat.planning import Category, DeviceKind, Phase, StepTrace, Workload, trace_step
from fraqat.planning.fake import new_fake_mode, to_fake
from fraqat.planning.recorder import StepRecorder

REFERENCE = EngineSpec("reference")
PLAIN = TrainSpec(batch_size=2, autocast="none")
RECORDED = TeacherSpec(outputs="recorded")
STEP_BYTES = 4
"""AdamW counts the steps of each parameter in a tensor of its own."""


def trace(
    workload: Workload | None = None, train: TrainSpec = PLAIN, micro_batch: int = 2, **options: Any
) -> StepTrace:
    kind = options.pop("kind", DeviceKind.CPU)
    return trace_step(workload or make_workload(), train, micro_batch, kind, **options)


def changing_bytes(trace: StepTrace, phase: Phase) -> int:
    return max(
        m.gradients + m.codes + m.activations + m.temporary for m in trace.moments if m.phase is phase
    )  # fmt: skip


def total_flops(trace: StepTrace, phase: Phase) -> int:
    return sum(item.num_flops * item.count for item in trace.work if item.phase is phase)


def test_what_stays_is_counted_by_its_parameters() -> None:
    student = make_student()
    count = num_parameters(student)
    traced = trace(make_workload(student, teacher_dtype=torch.bfloat16), TrainSpec(batch_size=2, ema_decay=0.9))
    num_tensors = len(list(student.parameters()))
    level_bytes = 4 * 4 * len(list(quantized_layers(student)))
    assert traced.constant[Category.WEIGHTS] == 4 * count + level_bytes
    assert traced.constant[Category.TEACHER] == 2 * count
    assert traced.constant[Category.OPTIMIZER] == 8 * count + STEP_BYTES * num_tensors
    assert traced.constant[Category.AVERAGE] == 4 * count
    assert traced.constant[Category.INPUTS] == 2 * LENGTH * WIDTH * 4


def test_gradients_are_whole_at_the_update_and_only_of_trained_parameters() -> None:
    student = make_student()
    for parameter in student.blocks[0].parameters():
        parameter.requires_grad_(False)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    traced = trace(make_workload(student))
    at_update = [moment.gradients for moment in traced.moments if moment.phase is Phase.UPDATE]
    assert set(at_update) == {4 * trained}
    assert traced.num_trained == trained
    assert traced.constant[Category.OPTIMIZER] < 8 * num_parameters(student)


def test_the_first_forward_has_no_gradients_and_a_later_part_has_them_all() -> None:
    one, later = trace(), trace(train=TrainSpec(batch_size=4, accumulation=2, autocast="none"))
    assert {m.gradients for m in one.moments if m.phase is Phase.FORWARD} == {0}
    assert {m.gradients for m in later.moments} == {4 * one.num_trained}


def test_a_later_part_needs_what_a_second_pass_needs() -> None:
    mode, recorder = new_fake_mode(), StepRecorder()
    student = to_fake(make_student(), mode)
    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: recorder.label((p.grad,), Category.GRADIENTS))
    with mode, recorder:
        recorder.label([*student.parameters(), *student.buffers()], Category.WEIGHTS)
        x = torch.empty(2, LENGTH, WIDTH)
        recorder.label((x,), Category.INPUTS)
        for _ in range(2):
            recorder.phase = Phase.FORWARD
            teacher = torch.empty_like(x)
            loss = torch.nn.functional.mse_loss(student(x), teacher)
            recorder.phase = Phase.BACKWARD
            loss.backward()
            del loss, teacher
    train = TrainSpec(batch_size=4, accumulation=2, autocast="none", engine=REFERENCE, teacher=RECORDED)
    passes = trace(train=train)
    second = max(m.gradients + m.codes + m.activations + m.temporary for m in recorder.moments)
    small = 64  # the loss is summed over outputs in a tensor of its own
    assert max(changing_bytes(passes, phase) for phase in (Phase.FORWARD, Phase.BACKWARD)) == pytest.approx(
        second, abs=small
    )


def test_activations_grow_by_the_same_amount_with_every_sample_and_codes_do_not_grow() -> None:
    traces = [trace(micro_batch=size) for size in (2, 3, 8)]
    held = [max(m.activations for m in t.moments if m.phase is Phase.FORWARD) for t in traces]
    assert held[1] - held[0] == (held[2] - held[1]) / 5 > 0
    assert len({max(m.codes for m in t.moments) for t in traces}) == 1


def codes_at_the_end(train: TrainSpec, **options: Any) -> int:
    return [m.codes for m in trace(train=train, **options).moments if m.phase is Phase.FORWARD][-1]


def test_codes_of_fake_quantization_are_weights_on_their_grid_and_clip_masks() -> None:
    num_weights = sum(layer.weight.numel() for _, layer in quantized_layers(make_student()))
    kept_bytes = 4 + 1  # the float weight on its grid, and one byte that says where it was not clipped
    assert codes_at_the_end(dataclasses.replace(PLAIN, engine=REFERENCE)) == num_weights * kept_bytes
    assert codes_at_the_end(TrainSpec(batch_size=2, autocast="bfloat16", engine=REFERENCE)) == num_weights * (2 + 1)


@pytest.mark.parametrize(("kind", "copies"), [(DeviceKind.GPU, 1), (DeviceKind.CPU, 2)])
def test_codes_of_the_integer_path_are_a_byte_for_a_weight(kind: DeviceKind, copies: int) -> None:
    layers = [layer for _, layer in quantized_layers(make_student())]
    num_weights = sum(layer.weight.numel() for layer in layers)
    num_channels = sum(len(layer.weight) for layer in layers)
    handles = 8 * len(layers)
    expected = copies * num_weights + (4 + 4) * num_channels + handles  # float32 scales and int32 sums of the codes
    assert codes_at_the_end(PLAIN, kind=kind) == expected


@pytest.mark.parametrize("kind", DeviceKind)
def test_blocks_of_this_cpu_are_no_part_of_a_plan(kind: DeviceKind, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        student = ToyNetwork()
    quantize_(student, QuantSpec(activation=ActivationSpec(6)))  # torch's own quantizer on every machine
    whole = trace(make_workload(student), TrainSpec(batch_size=2), kind=kind)
    monkeypatch.setattr(blocks, "_CACHED_BYTES", 1)
    in_rows = trace(make_workload(student), TrainSpec(batch_size=2), kind=kind)
    assert in_rows.work == whole.work and in_rows.moments == whole.moments


def test_the_integer_path_keeps_a_byte_for_an_input_and_fake_quantization_more() -> None:
    with torch.device("meta"):
        student = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)))
    quantize_(student)
    rows = 1024

    def held(engine: EngineSpec) -> list[int]:
        workload = Workload(student, predict, lambda n: {"x": torch.empty(n, WIDTH, device="meta")})
        train = TrainSpec(batch_size=rows, autocast="none", engine=engine, teacher=RECORDED)
        traced = trace(workload, train, micro_batch=rows)
        return [m.activations for m in traced.moments if m.phase is Phase.FORWARD]

    # The last layer's output and the loss are there too.
    assert held(EngineSpec())[-1] / (rows * WIDTH) < 5 * (1 + 4 / WIDTH) + 3 * 4
    assert held(REFERENCE)[-1] / (rows * WIDTH) > 5 * 4


def test_matrix_products_are_counted() -> None:
    rows = 2 * LENGTH
    forward = 2 * rows * (NUM_BLOCKS * 2 * WIDTH * HIDDEN + WIDTH * WIDTH)
    traced = trace()
    assert total_flops(traced, Phase.TEACHER) == total_flops(traced, Phase.FORWARD) == forward
    assert total_flops(traced, Phase.BACKWARD) == 2 * forward  # the norm before the first layer is trained too


def make_toy_inputs(num_samples: int) -> dict[str, Tensor]:
    return {"x": torch.empty(num_samples, LENGTH, WIDTH, device="meta")}


def test_views_move_nothing_and_a_sum_reads_two_and_writes_one() -> None:
    def run(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        x = inputs["x"].view(-1, WIDTH).t().detach().t()
        if model.training:
            return {"output": model(x)}
        return {"output": x + x.expand_as(x)}

    with torch.device("meta"):
        student = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    quantize_(student)
    traced = trace(Workload(student, run, make_toy_inputs))
    moved = {item.name: item.num_bytes for item in traced.work if item.phase is Phase.TEACHER}
    assert moved == {"add": 3 * 4 * 2 * LENGTH * WIDTH}


def test_a_teacher_with_recorded_outputs_takes_neither_memory_nor_time_in_training() -> None:
    with_teacher, recorded = trace(), trace(train=dataclasses.replace(PLAIN, teacher=RECORDED))
    assert with_teacher.constant[Category.TEACHER] > 0 == recorded.constant[Category.TEACHER]
    assert not [item for item in recorded.work if item.phase in (Phase.TEACHER, Phase.RECORDING)]
    assert total_flops(recorded, Phase.BACKWARD) == total_flops(with_teacher, Phase.BACKWARD)
    assert with_teacher.recording is None
    before = recorded.recording
    assert before is not None
    assert before.constant[Category.TEACHER] == with_teacher.constant[Category.TEACHER]
    assert before.constant[Category.OPTIMIZER] == 0 < recorded.constant[Category.OPTIMIZER]
    assert sum(item.num_flops * item.count for item in before.work) == total_flops(with_teacher, Phase.TEACHER)
    assert before.part_bytes == before.held_out_bytes == 2 * LENGTH * WIDTH * 4


@pytest.mark.parametrize("engine", [EngineSpec(), EngineSpec("reference")])
def test_checkpointing_saves_memory_and_computes_no_product_again(engine: EngineSpec) -> None:
    with torch.device("meta"):
        student = ToyNetwork(num_blocks=5, block=GatedBlock)
    quantize_(student)
    workload = make_workload(student)
    plain = TrainSpec(batch_size=64, autocast="none", engine=engine)
    full = trace(workload, plain, micro_batch=64)
    thin = trace(workload, dataclasses.replace(plain, activation_checkpointing="blocks"), micro_batch=64)
    held = [max(m.activations for m in t.moments if m.phase is Phase.FORWARD) for t in (full, thin)]
    assert held[1] < 0.8 * held[0]
    assert total_flops(thin, Phase.BACKWARD) == total_flops(full, Phase.BACKWARD)


def test_an_8_bit_optimizer_has_two_bytes_and_scales_where_a_tensor_is_large() -> None:
    student = make_student(hidden=4096 // WIDTH)
    traced = trace(make_workload(student), dataclasses.replace(PLAIN, optimizer="adamw_8bit"))
    sizes = [parameter.numel() for parameter in student.parameters()]
    large = [size for size in sizes if size >= 4096 and size % 256 == 0]
    assert large
    maps = 2 * 256 * 4 * len(large)
    expected = 2 * sum(size + 4 * size // 256 for size in large) + maps + 8 * (sum(sizes) - sum(large))
    assert traced.constant[Category.OPTIMIZER] == expected + STEP_BYTES * len(sizes)


def test_the_teacher_is_counted_as_it_is_held() -> None:
    student = make_student()
    layers = [layer for _, layer in quantized_layers(student)]
    num_weights, num_channels = (sum(size(layer.weight) for layer in layers) for size in (torch.numel, len))
    rest = 4 * (num_parameters(student) - num_weights)
    held = {
        dtype: trace(train=dataclasses.replace(PLAIN, teacher=TeacherSpec(dtype))).constant[Category.TEACHER]
        for dtype in ("model", "bfloat16", "int8")
    }
    assert held["model"] == 4 * num_weights + rest
    assert held["bfloat16"] == 2 * num_weights + rest
    assert held["int8"] == num_weights + 4 * num_channels + rest


def test_what_the_student_leaves_frozen_is_counted_once() -> None:
    student = make_student()
    for parameter in student.blocks.parameters():
        parameter.requires_grad_(False)
    traced = trace(make_workload(student))
    frozen = num_parameters(student.blocks)
    assert traced.constant[Category.TEACHER] == 4 * (num_parameters(student) - frozen)
    in_half = trace(make_workload(student, teacher_dtype=torch.bfloat16))
    assert in_half.constant[Category.TEACHER] == 2 * num_parameters(student)


def test_validation_runs_on_the_whole_batch_without_autocast() -> None:
    small = trace(train=TrainSpec(batch_size=4, accumulation=2, engine=REFERENCE), micro_batch=2)
    large = trace(train=TrainSpec(batch_size=16, accumulation=8, engine=REFERENCE), micro_batch=2)
    assert changing_bytes(large, Phase.VALIDATION) > changing_bytes(small, Phase.VALIDATION)
    assert {item.dtype for item in small.work if item.phase is Phase.VALIDATION and item.num_flops} == {torch.float32}


def test_a_model_far_larger_than_memory_is_traced_without_it() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    width = 65536
    with torch.device("meta"):
        student = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    quantize_(student)
    traced = trace(Workload(student, predict, lambda n: {"x": torch.empty(n, width, device="meta")}))
    assert traced.constant[Category.WEIGHTS] > 30 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_the_caller_s_model_is_left_alone() -> None:
    student = make_student()
    trace(make_workload(student))
    assert all(parameter.is_meta and parameter.grad is None for parameter in student.parameters())
    assert not any(layer.weight_quantizer._forward_hooks for _, layer in quantized_layers(student))


def test_fake_copies_keep_ties_classes_and_flags() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    quantize_(model)
    fake = to_fake(model, new_fake_mode())
    assert fake[0].weight is fake[1].weight
    assert type(fake[0]) is type(model[0])
    assert not fake[0].bias.requires_grad
    assert fake[0].weight.device.type == "cpu"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).unflatten(-1, (2, -1)).transpose(1, 2)
        with sdpa_kernel(SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("kind", "power"), [(DeviceKind.CPU, 2), (DeviceKind.GPU, 1)])
def test_fused_attention_of_a_gpu_keeps_no_scores(kind: DeviceKind, power: int) -> None:
    with torch.device("meta"):
        student = nn.Sequential(Attention())
    quantize_(student)
    held: list[int] = []
    for length in (1024, 2048):
        workload = Workload(student, predict, lambda n, length=length: {"x": torch.empty(n, length, WIDTH)})
        traced = trace(workload, micro_batch=1, kind=kind)
        held.append(max(m.activations for m in traced.moments))
    assert held[1] / held[0] == pytest.approx(2**power, rel=0.1)


@pytest.mark.parametrize(("kind", "dtype"), [(DeviceKind.CPU, torch.bfloat16), (DeviceKind.GPU, torch.float32)])
def test_autocast_runs_norms_in_the_precision_of_the_device(kind: DeviceKind, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        student = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False))
    quantize_(student)
    traced = trace(Workload(student, predict, make_toy_inputs), TrainSpec(batch_size=2, autocast="bfloat16"), kind=kind)
    norms = {item.dtype for item in traced.work if item.name == "native_layer_norm" and item.phase is Phase.FORWARD}
    assert norms == {dtype}


class AsksForValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand([]) < 0.1:
            return x
        y = self.inner(x)
        return y[y[..., 0] > 0][(x[..., 0] > 0).flatten().nonzero().squeeze(1)]


def test_a_condition_on_values_is_false_and_a_mask_selects_everything() -> None:
    with torch.device("meta"):
        student = nn.Sequential(AsksForValues())
    quantize_(student)
    traced = trace(Workload(student, predict, make_toy_inputs))
    assert total_flops(traced, Phase.FORWARD) == 2 * 2 * LENGTH * WIDTH * WIDTH
