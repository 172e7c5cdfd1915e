"""Laws of the training loop: it learns, it resumes bitwise, it stops safely."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from toy import ToyTask, toy_spec, toy_teacher

from fraqat.distill import Distiller, StepRecord, TeacherSpec, read_log
from fraqat.errors import CheckpointError, ConfigError, InterruptedRunError, NonFiniteLossError
from fraqat.nn import QuantSpec, WeightSpec, quantize_, quantized_layers
from fraqat.schedules import LearningRateSpec, ScheduleSpec


class StopAt:
    """Raises in the middle of a run, as a crash would, after `step` steps."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, record: StepRecord) -> None:
        if record.step + 1 == self.step:
            raise RuntimeError("crash")


EIGHT_BIT_HIDDEN = 512
"""8 x 512 weights are the fewest whose state torchao keeps in 8 bits."""


def weights(distiller) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in distiller.student.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_training_lowers_the_held_out_loss(make_distiller) -> None:
    rate = LearningRateSpec(peak=2e-3)
    settings = {"batch_size": 16, "checkpoint_every": 100, "validate_every": 100, "autocast": "bfloat16"}
    distiller = make_distiller(steps=200, learning_rate=rate, **settings)
    before = distiller.validate()
    result = distiller.run()
    assert result.num_steps == 200
    assert result.validation_loss < 0.7 * before


def test_the_student_ends_at_the_target_width_and_passes_every_stage(make_distiller, tmp_path: Path) -> None:
    distiller = make_distiller(steps=18)
    distiller.run()
    assert {layer.weight_quantizer.bits for _, layer in quantized_layers(distiller.student)} == {4.0}
    stages = [event["bits"] for event in read_log(tmp_path / "run") if event["event"] == "stage"]
    assert stages == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4]


@pytest.mark.parametrize("crash_after", [4, 6, 9, 17])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.9, "accumulation": 2, "weight_decay": 0.1},
        {"optimizer": "adamw_8bit", "hidden": EIGHT_BIT_HIDDEN, "weight_decay": 0.1},
        {"optimizer": "adamw_adapted", "weight_decay": 0.1},
        {"teacher": TeacherSpec("int8")},
        {"schedule": ScheduleSpec("fractional", grid="final").resolve(4.0, 18)},
        {"learning_rate": LearningRateSpec(1e-2, "cooldown", cooldown_shape="sqrt")},
    ],
    ids=["plain", "averaged", "8-bit", "adapted", "int8 teacher", "final grid", "cooldown"],
)
def test_an_interrupted_run_ends_bitwise_equal(make_distiller, crash_after: int, options) -> None:
    whole = make_distiller(folder="whole", dropout=0.2, **options)
    whole_result = whole.run()
    with pytest.raises(RuntimeError, match="crash"):
        make_distiller(folder="cut", dropout=0.2, on_step=StopAt(crash_after), **options).run()
    resumed = make_distiller(folder="cut", dropout=0.2, **options)
    result = resumed.run()
    assert resumed.step == whole.step
    assert_same(weights(resumed), weights(whole))
    assert result.validation_loss == whole_result.validation_loss


def test_a_resumed_log_has_every_step_once(make_distiller, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        make_distiller(on_step=StopAt(11)).run()
    make_distiller().run()
    events = read_log(tmp_path / "run")
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(18))
    assert [e["step"] for e in events if e["event"] == "validation"] == [5, 10, 15, 18]
    assert [e["step"] for e in events if e["event"] == "stage"] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_finished_run_is_not_trained_again(make_distiller) -> None:
    first = make_distiller()
    first.run()
    seen: list[StepRecord] = []
    again = make_distiller(on_step=seen.append)
    again.run()
    assert seen == []
    assert_same(weights(again), weights(first))


def test_accumulation_gives_the_gradient_of_the_whole_batch(make_distiller) -> None:
    class NoiseFree:
        """The toy task without its random part, so that parts and whole see the same inputs."""

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def make_inputs(self, batch, generator):
            return batch

    schedule = ScheduleSpec("constant").resolve(4.0, 3)
    options = {"schedule": schedule, "autocast": "none", "clip_norm": None, "task": NoiseFree(ToyTask())}
    whole = make_distiller(folder="one", **options)
    parts = make_distiller(folder="two", accumulation=2, **options)
    whole.run()
    parts.run()
    for (name, left), right in zip(whole.student.named_parameters(), parts.student.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-5), name


def test_average_follows_the_formula(make_distiller) -> None:
    distiller = make_distiller(steps=9, ema_decay=0.5)
    start = distiller.student[0].weight.detach().clone()
    seen: list[torch.Tensor] = []
    distiller.on_step = lambda record: seen.append(distiller.student[0].weight.detach().clone())
    distiller.run()
    expected = start.double()
    for i, value in enumerate(seen):
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * value.double()
    assert torch.allclose(distiller.student[0].weight.double(), expected, atol=1e-6)


def test_non_finite_loss_names_step_stage_and_layer_and_keeps_the_checkpoint(make_distiller, tmp_path: Path) -> None:
    distiller = make_distiller()

    def poison(record: StepRecord) -> None:
        if record.step == 5:
            with torch.no_grad():
                distiller.student[3].weight[0, 0] = float("inf")

    distiller.on_step = poison
    with pytest.raises(
        NonFiniteLossError, match=r"step 6, stage 7 of 9 \(4.5 bits\), first in student layer 3\."
    ) as error:
        distiller.run()
    assert error.value.exit_code == 5
    assert make_distiller().store.load_latest().step == 4


def test_non_finite_teacher_is_named(make_distiller) -> None:
    distiller = make_distiller()
    with torch.no_grad():
        distiller.teacher[0].bias[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="teacher layer 0"):
        distiller.run()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_resumes_bitwise(make_distiller, number, exit_code) -> None:
    whole = make_distiller(folder="whole")
    whole.run()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(record: StepRecord) -> None:
        if record.step == 6:
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRunError, match="after step 7 of 18: a checkpoint is in") as error:
        make_distiller(folder="cut", on_step=interrupt).run()
    assert error.value.exit_code == exit_code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = make_distiller(folder="cut")
    assert resumed.store.load_latest().step == 7
    resumed.run()
    assert_same(weights(resumed), weights(whole))


def test_a_signal_in_the_last_step_is_obeyed(make_distiller) -> None:
    def interrupt(record: StepRecord) -> None:
        if record.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="after step 18 of 18"):
        make_distiller(on_step=interrupt).run()
    assert make_distiller().run().num_steps == 18


def test_a_failure_before_the_first_checkpoint_does_not_promise_one(make_distiller) -> None:
    distiller = make_distiller()
    with torch.no_grad():
        distiller.student[0].bias[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="No checkpoint had been written yet"):
        distiller.run()


def test_other_settings_are_refused_with_the_difference(make_distiller) -> None:
    make_distiller(fingerprint={"train": {"steps": 18}, "b": 2}).run()
    with pytest.raises(CheckpointError, match=r"train\.steps was 18 and is now 20"):
        make_distiller(fingerprint={"train": {"steps": 20}, "b": 2}).run()


def test_learning_rate_and_bits_are_logged_per_step(make_distiller, tmp_path: Path) -> None:
    rate = LearningRateSpec(peak=1e-2, kind="decay_last")
    distiller = make_distiller(learning_rate=rate)
    distiller.run()
    steps = [e for e in read_log(tmp_path / "run") if e["event"] == "step"]
    assert [e["learning_rate"] for e in steps] == [rate.at(i, distiller.schedule) for i in range(18)]
    assert [e["bits"] for e in steps] == [distiller.schedule.stage_at(i).bits for i in range(18)]


def test_tensorboard_files_are_written(make_distiller, tmp_path: Path) -> None:
    make_distiller(steps=9, tensorboard=True).run()
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_frozen_parameters_do_not_move(make_distiller) -> None:
    distiller = make_distiller()
    student = distiller.student
    student[0].weight.requires_grad_(False)
    kept = student[0].weight.clone()
    fresh = type(distiller)(
        distiller.task, distiller.teacher, student, distiller.schedule, distiller.spec, distiller.folder
    )
    fresh.run()
    assert torch.equal(student[0].weight, kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 3}, "train.accumulation = 3 .* a divisor of batch_size"),
        ({"ema_decay": 1.0}, r"train.ema_decay = 1.0 .* \[0, 1\), or null"),
        ({"steps": 3, "epochs": 2.0}, "train.epochs = 2.0 .* null when train.steps is given"),
        ({"clip_norm": 0.0}, "train.clip_norm = 0.0 .* more than 0"),
        ({"seed": -1}, "train.seed = -1"),
        ({"optimizer": "sgd"}, "train.optimizer = 'sgd' .* adamw, adamw_adapted, adamw_8bit"),
        ({"optimizer_device": "disk"}, "train.optimizer_device = 'disk' .* same, host"),
        ({"activation_checkpointing": "all"}, "train.activation_checkpointing = 'all' .* none, blocks"),
    ],
)
def test_impossible_settings_are_refused(changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_spec(**changes)


def test_an_average_of_learned_scales_is_refused(tmp_path: Path) -> None:
    teacher, student = toy_teacher(0.0, 16), toy_teacher(0.0, 16).requires_grad_(True)
    quantize_(student, QuantSpec(WeightSpec(range_method="learned")))
    schedule = ScheduleSpec("fractional").resolve(4.0, 18)
    with pytest.raises(ConfigError, match=r"train.ema_decay = 0.9 .* null with learned scales"):
        Distiller(ToyTask(), teacher, student, schedule, toy_spec(ema_decay=0.9), tmp_path / "run")
