"""Laws of training at several widths and of schedules that training chooses itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import ToyTask, toy_spec, toy_teacher

from fraqat.distill import Distiller, StepRecord, Workers, read_log
from fraqat.distill.stages import StageChooser
from fraqat.errors import ConfigError
from fraqat.nn import (
    EngineSpec,
    QuantSpec,
    WeightSpec,
    quantize_,
    quantized_layers,
    scale_parameters,
    serve_widths_,
    set_bits_,
)
from fraqat.schedules import AutomaticSpec, LearningRateSpec, Schedule, ScheduleSpec, Stage

WIDTHS = (8, 6, 4)
EAGER = AutomaticSpec(ramp_share=0.5, rise=1.5, window_share=0.02, gain=0.05)


class StopAt:
    def __init__(self, step: int):
        self.step = step

    def __call__(self, record: StepRecord) -> None:
        if record.step + 1 == self.step:
            raise RuntimeError("crash")


def several(order: str, num_steps: int, seed: int = 1) -> Schedule:
    return ScheduleSpec("several", widths=WIDTHS, order=order).resolve(4, num_steps, seed=seed)


def make(folder: Path, schedule: Schedule, method: str = "learned", **options) -> Distiller:
    """A trainer of the toy family."""
    dropout, rate = options.pop("dropout", 0.1), options.pop("rate", 5e-3)
    weight = WeightSpec(options.pop("bits", 4.0), range_method=method, narrow=options.pop("narrow", False))
    student = toy_teacher(dropout)
    quantize_(student, QuantSpec(weight))
    if schedule.widths:
        serve_widths_(student, schedule.widths)
    on_step = options.pop("on_step", lambda record: None)
    spec = toy_spec(learning_rate=LearningRateSpec(peak=rate, kind="cosine"), **options)
    return Distiller(
        ToyTask(), toy_teacher(dropout), student, schedule, spec, folder, on_step=on_step, warn=lambda text: None
    )


@pytest.mark.parametrize(("crash_after", "method"), [(3, "learned"), (7, "mse")])
def test_a_run_from_below_trains_under_the_target_and_ends_at_it(tmp_path, crash_after, method) -> None:
    schedule = ScheduleSpec("custom", ((3.0, 5), (8.0, 2), (4.0, 5)), "steps").resolve(4, None)
    whole = make(tmp_path / "whole", schedule, method)
    whole.run()
    assert [event["bits"] for event in read_log(tmp_path / "whole") if event["event"] == "step"] == [3] * 5 + [
        8
    ] * 2 + [4] * 5
    assert {layer.weight_quantizer.bits for _, layer in quantized_layers(whole.student)} == {4}
    with pytest.raises(RuntimeError, match="crash"):
        make(tmp_path / "cut", schedule, method, on_step=StopAt(crash_after)).run()
    again = make(tmp_path / "cut", schedule, method)
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), again.student.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stages", "student", "message"),
    [
        (((8.0, 2), (3.0, 2)), {"bits": 4.0}, r"schedule = 3\.0 .* an end at 4 bits, .* Fix: end the schedule there"),
        (((3.5, 2), (4.0, 2)), {"bits": 6.0}, r"schedule = 4\.0 .* an end at 6 bits"),
        (((4.0, 2), (1.9, 1), (4.0, 2)), {"narrow": True}, r"schedule\.stages = 1\.9 .* 2 bits or more with narrow"),
    ],
)
def test_widths_that_the_student_cannot_end_at_or_have_are_refused_before_training(
    tmp_path, stages, student, message
) -> None:
    schedule = ScheduleSpec("custom", stages, "steps").resolve(stages[-1][0], None)
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, schedule, "max_abs", **student)


@pytest.mark.parametrize(("order", "method", "crash_after"), [("in_turn", "learned", 5), ("sampled", "mse", 9)])
def test_an_interrupted_run_of_several_widths_ends_bitwise_equal(tmp_path, order, method, crash_after) -> None:
    schedule = several(order, 15)
    whole = make(tmp_path / "whole", schedule, method)
    result = whole.run()
    with pytest.raises(RuntimeError, match="crash"):
        make(tmp_path / "cut", schedule, method, on_step=StopAt(crash_after)).run()
    resumed = make(tmp_path / "cut", schedule, method)
    assert replace(resumed.run(), train_s=result.train_s) == result
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name


def test_every_step_trains_one_width_and_every_width_is_measured(tmp_path: Path) -> None:
    distiller = make(tmp_path, several("in_turn", 15))
    before = [scale.detach().clone() for scale in scale_parameters(distiller.student)]
    result = distiller.run()
    events = read_log(tmp_path)
    assert [e["bits"] for e in events if e["event"] == "step"] == [8, 6, 4] * 5
    assert [(e["step"], e["bits"]) for e in events if e["event"] == "width"] == [
        (step, bits) for step in (5, 10, 15) for bits in (8, 6)
    ]
    assert [(e["step"], e["bits"]) for e in events if e["event"] == "validation"] == [(5, 4), (10, 4), (15, 4)]
    assert list(result.losses) == ["8", "6", "4"] and result.losses["4"] == result.validation_loss
    assert result.losses["8"] < result.losses["4"]
    after = scale_parameters(distiller.student)
    assert len(after) == 6 and all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {layer.weight_quantizer.bits for _, layer in quantized_layers(distiller.student)} == {4}


def test_the_narrow_width_learns_and_the_wide_one_loses_less_than_in_a_model_for_it_alone(tmp_path: Path) -> None:
    options = {"batch_size": 16, "checkpoint_every": 120, "validate_every": 120, "engine": EngineSpec("reference")}
    options |= {"dropout": 0.0, "rate": 2e-3, "bits": 2.0}
    alone = make(tmp_path / "alone", ScheduleSpec("constant").resolve(2, 120), **options)
    untrained = alone.validate()
    alone.run()
    set_bits_(alone.student, 8)
    both = ScheduleSpec("several", widths=(8, 2)).resolve(2, 120)
    losses = make(tmp_path / "both", both, **options).run().losses
    assert losses["8"] < losses["2"] < 0.8 * untrained, (untrained, losses)
    assert losses["8"] < 0.8 * alone.validate()


# --- automatic


def automatic(num_steps: int, spec: AutomaticSpec = EAGER) -> Schedule:
    return ScheduleSpec("automatic", automatic=spec).resolve(4, num_steps)


@pytest.mark.parametrize("crash_after", [6, 13])
def test_an_interrupted_automatic_run_chooses_the_same_stages(tmp_path: Path, crash_after: int) -> None:
    whole = make(tmp_path / "whole", automatic(24))
    result = whole.run()
    with pytest.raises(RuntimeError, match="crash"):
        make(tmp_path / "cut", automatic(24), on_step=StopAt(crash_after)).run()
    resumed = make(tmp_path / "cut", automatic(24))
    assert replace(resumed.run(), train_s=result.train_s) == result
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name


def test_the_stages_are_recorded_and_repeat_the_run_as_a_custom_schedule(tmp_path: Path) -> None:
    cautious = replace(EAGER, rise=1.0)  # one width after the other, whatever the draws of the run
    result = make(tmp_path / "a", automatic(24, cautious)).run()
    bits, lengths = zip(*result.stages, strict=True)
    assert bits[0] == 8 and bits[-1] == 4 and list(bits) == sorted(set(bits), reverse=True) and len(bits) > 2
    assert sum(lengths) == 24 and lengths[-1] >= 12
    events = [e for e in read_log(tmp_path / "a") if e["event"] == "stage"]
    assert [(e["bits"], e["step"]) for e in events] == [(b, sum(lengths[:i])) for i, b in enumerate(bits)]
    again = ScheduleSpec("custom", result.stages, "steps").resolve(4, None)
    repeated = make(tmp_path / "b", again).run()
    assert repeated.validation_loss == result.validation_loss and repeated.stages == result.stages


def test_a_stage_ends_at_a_plateau_and_goes_as_far_as_the_curve_allows() -> None:
    chooser = StageChooser(automatic(100, AutomaticSpec(ramp_share=0.5, rise=2, window_share=0.02, gain=0.05)))
    assert chooser.candidates == (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4)
    assert chooser.wants_losses(1, 1.0)
    chooser.choose(1, {8: 1, 7: 1.2, 6: 1.9, 5.5: 2.5, 5: 4, 4.75: 5, 4.5: 6, 4.25: 7, 4: 9})
    assert chooser.schedule.stages[-1] == Stage(1, 6, 1, 99)
    falling = [1.0, 0.9, 0.7, 0.6, 0.5, 0.4]
    assert not any(chooser.wants_losses(2 + i, loss) for i, loss in enumerate(falling))
    assert not chooser.wants_losses(8, 0.38)  # windows 0.55 and 0.39
    assert chooser.wants_losses(9, 0.50)  # windows 0.45 and 0.44: less than 5 % better
    chooser.choose(9, {6: 1, 5.5: 2.1, 5: 4, 4.75: 5, 4.5: 6, 4.25: 7, 4: 9})
    assert chooser.schedule.stages[-1].bits == 5.5  # none is near enough: the next one
    assert not chooser.wants_losses(49, 1.0)
    assert chooser.wants_losses(50, 0.1)  # the ramp's share is spent
    chooser.choose(50, {5.5: 1, 5: 1, 4.75: 1, 4.5: 1, 4.25: 1, 4: 9})
    assert [(s.bits, s.num_steps) for s in chooser.schedule] == [(8, 1), (6, 8), (5.5, 41), (4, 50)]
    assert chooser.schedule.is_decided and not chooser.wants_losses(60, 9.0)


def test_choosing_leaves_the_student_bitwise_as_it_was(tmp_path: Path) -> None:
    never = AutomaticSpec(ramp_share=0.9, rise=1.0, window_share=0.4, gain=0.0)  # measured once, after the first step
    chosen = make(tmp_path / "a", automatic(9, never)).run()
    assert len(chosen.stages) == 3
    same = make(tmp_path / "b", ScheduleSpec("custom", chosen.stages, "steps").resolve(4, None)).run()
    assert same.validation_loss == chosen.validation_loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_widths_are_chosen_by_the_loss_of_the_whole_batch(tmp_path: Path, accumulation: int) -> None:
    class Counting(ToyTask):
        num_rows: int | None = None

        def predict(self, model, inputs):
            if self.num_rows is not None:
                self.num_rows += len(inputs["x"])
            return super().predict(model, inputs)

    distiller = make(tmp_path, automatic(24), accumulation=accumulation)
    task = distiller.task = distiller._gradients._task = Counting()
    for predictor in (distiller.models.teacher, distiller.models.student):
        predictor._task = task
    measured, found = distiller._losses_of, []

    def counted(parts):
        task.num_rows = 0
        losses = measured(parts)
        found.append((task.num_rows, len(losses)))
        task.num_rows = None
        return losses

    distiller._losses_of = counted
    distiller.run()
    assert found and found == [(2 * num_widths * distiller.spec.batch_size, num_widths) for _, num_widths in found]


def test_the_first_of_several_processes_chooses() -> None:
    class Told(Workers):
        def gather(self, values):
            return [[told.pop(0)], list(values)]

    chooser = StageChooser(automatic(100), Told(1, 2))
    told = [0.0, 1.0, 5.5]
    assert not chooser.wants_losses(1, 1.0)  # alone it would: the first stage has one step
    assert chooser.wants_losses(2, 1.0)
    chooser.choose(2, dict.fromkeys(chooser.candidates, 1.0))  # alone it would go to 4 bits
    assert chooser.schedule.stages[-1].bits == 5.5


def test_the_learning_rate_decays_only_where_the_target_is_reached() -> None:
    rate, schedule = LearningRateSpec(peak=1.0, kind="decay_last"), automatic(100)
    assert rate.at(60, schedule) == 1.0
    reached = schedule.narrowed(1, 6).narrowed(20, 4)
    assert rate.at(19, reached) == 1.0 and rate.at(60, reached) == pytest.approx(0.5)
