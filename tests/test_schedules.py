"""Laws of bit-width schedules and learning rates."""

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fraqat.errors import ConfigError
from fraqat.schedules import (
    AutomaticSpec,
    CooldownShape,
    LearningRateKind,
    LearningRateSpec,
    Schedule,
    ScheduleKind,
    ScheduleSpec,
    StageUnit,
)

TABLE_4_BITS = (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4)
TABLE_4_EPOCHS = (1, 1, 1, 1, 1, 2, 2, 2, 14)
NAMED = [ScheduleKind(name) for name in ("fractional", "integer", "simple", "constant")]


def bits_of(schedule: Schedule) -> tuple[float, ...]:
    return tuple(stage.bits for stage in schedule)


def steps_of(schedule: Schedule) -> tuple[int, ...]:
    return tuple(stage.num_steps for stage in schedule)


def custom(*stages: tuple[float, float], unit: str = "share") -> ScheduleSpec:
    return ScheduleSpec("custom", stages, unit)


# --- named schedules


def test_default_with_25_steps_is_table_4() -> None:
    schedule = ScheduleSpec().resolve(4, 25)
    assert bits_of(schedule) == TABLE_4_BITS
    assert steps_of(schedule) == TABLE_4_EPOCHS


@pytest.mark.parametrize("factor", [2, 4, 100, 1234])
def test_table_4_scales_exactly(factor: int) -> None:
    schedule = ScheduleSpec().resolve(4, 25 * factor)
    assert steps_of(schedule) == tuple(factor * epochs for epochs in TABLE_4_EPOCHS)


@pytest.mark.parametrize(
    ("kind", "bits", "steps"),
    [
        ("integer", (8, 7, 6, 5, 4), (275, 275, 275, 275, 1400)),
        ("simple", (16, 8, 4), (550, 550, 1400)),
        ("constant", (4,), (2500,)),
    ],
)
def test_ablations_are_those_of_the_paper(kind: str, bits: tuple[float, ...], steps: tuple[int, ...]) -> None:
    schedule = ScheduleSpec(kind).resolve(4, 2500)
    assert bits_of(schedule) == bits
    assert steps_of(schedule) == steps


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("target", [1.5, 2, 2.5, 3, 3.7, 4, 4.5, 5, 6, 7, 8, 12, 16])
def test_named_schedule_falls_to_any_target(kind: ScheduleKind, target: float) -> None:
    bits = bits_of(ScheduleSpec(kind).resolve(target, 100_000))
    assert bits[-1] == target
    assert all(later < earlier for earlier, later in itertools.pairwise(bits))
    assert bits[0] <= (16 if kind is ScheduleKind.SIMPLE else max(8, target))


def test_fractional_ramp_keeps_its_distances_for_another_target() -> None:
    schedule = ScheduleSpec().resolve(3, 2600)
    assert bits_of(schedule) == (8, 7, 6, 5, 4.5, 4, 3.75, 3.5, 3.25, 3)
    assert steps_of(schedule) == (100, 100, 100, 100, 100, 100, 200, 200, 200, 1400)


@given(kind=st.sampled_from(NAMED), target=st.floats(1.01, 16), total=st.integers(-5, 5000))
def test_lengths_sum_to_the_total_or_are_refused(kind: ScheduleKind, target: float, total: int) -> None:
    spec = ScheduleSpec(kind)
    try:
        schedule = spec.resolve(target, total)
    except ConfigError as error:
        assert f"train.steps = {total} " in str(error)  # noqa: PT017
        assert total < 40
        return
    assert sum(steps_of(schedule)) == schedule.total_steps == total
    assert min(steps_of(schedule)) >= 1
    weights = [length for _, length in spec.lengths(target)]
    for steps, weight in zip(steps_of(schedule), weights, strict=True):
        assert abs(steps - total * weight / sum(weights)) < 1


def test_table_4_fits_every_total_from_21_steps() -> None:
    for total in range(21, 500):
        steps = steps_of(ScheduleSpec().resolve(4, total))
        assert sum(steps) == total
        assert steps[-1] == max(steps)


@given(shares=st.lists(st.integers(1, 50), min_size=1, max_size=8), total=st.integers(400, 5000))
def test_custom_shares_sum_to_the_total(shares: list[int], total: int) -> None:
    stages = [(float(20 - i), share / sum(shares)) for i, share in enumerate(shares)]
    schedule = custom(*stages).resolve(stages[-1][0], total)
    assert sum(steps_of(schedule)) == total
    for steps, share in zip(steps_of(schedule), shares, strict=True):
        assert abs(steps - total * share / sum(shares)) < 1


# --- custom schedules


def test_custom_shares() -> None:
    schedule = custom((8, 0.25), (4.5, 0.25), (3, 0.5)).resolve(3, 40)
    assert bits_of(schedule) == (8, 4.5, 3)
    assert steps_of(schedule) == (10, 10, 20)


def test_custom_steps_give_the_total() -> None:
    spec = custom((8, 7), (4, 30), unit="steps")
    assert steps_of(spec.resolve(4, None)) == (7, 30)
    assert spec.resolve(4, 37).total_steps == 37


def test_custom_epochs_are_multiplied() -> None:
    spec = custom((8, 1), (5.5, 0.5), (4, 3), unit="epochs")
    assert steps_of(spec.resolve(4, None, steps_per_epoch=12)) == (12, 6, 36)
    assert spec.resolve(4, 54, steps_per_epoch=12).total_steps == 54


def test_stages_follow_one_another_without_a_gap() -> None:
    schedule = ScheduleSpec().resolve(4, 137)
    assert [stage.index for stage in schedule] == list(range(9))
    assert schedule.stages[0].first_step == 0
    for earlier, later in itertools.pairwise(schedule):
        assert earlier.end_step == later.first_step
    assert schedule.stages[-1].end_step == schedule.total_steps == 137
    assert len(schedule) == 9


def test_stage_at_changes_exactly_at_the_boundaries() -> None:
    schedule = custom((8, 3), (5, 1), (4, 6), unit="steps").resolve(4, None)
    assert [schedule.stage_at(step).bits for step in range(12)] == [8, 8, 8, 5, 4, 4, 4, 4, 4, 4, 4, 4]


@given(total=st.integers(21, 400), data=st.data())
def test_stage_at_is_the_stage_that_holds_the_step(total: int, data: st.DataObject) -> None:
    schedule = ScheduleSpec().resolve(4, total)
    step = data.draw(st.integers(0, total - 1))
    stage = schedule.stage_at(step)
    assert stage.first_step <= step < stage.end_step


# --- what is refused


@pytest.mark.parametrize(
    ("stages", "unit", "message"),
    [
        ([], "share", r"schedule\.stages = \[\] .* at least one \[bits, length\] .* Fix: add stages"),
        ([(8, 0.5), (8, 0.5)], "share", r"\[\[8\.0, 0\.5\], \[8\.0, 0\.5\]\] .* another width .* Fix: join the stages"),
        ([(8, 0.5), (4, 0.4)], "share", r"shares that sum to 1 \(they sum to 0\.9\).* set unit: epochs or steps"),
        ([(8, 1), (4, 1)], "share", r"shares that sum to 1 \(they sum to 2\)"),
        ([(8, 1.5), (4, -0.5)], "share", "positive lengths"),
        ([(8, 0), (4, 1)], "share", "positive lengths"),
        ([(8, math.nan), (4, 1)], "epochs", "positive lengths"),
        ([(8, math.inf), (4, 1)], "steps", "positive lengths"),
        ([(40, 0.5), (4, 0.5)], "share", r"bits = 40\.0 .* 1 < bits <= 32"),
        ([(8, 0.5), (0.5, 0.5)], "share", r"bits = 0\.5 "),
        ([(math.nan, 1)], "share", r"bits = nan "),
    ],
)
def test_impossible_stages_are_refused(stages: list[tuple[float, float]], unit: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleSpec("custom", tuple(stages), unit)


def test_last_entry_must_be_the_target() -> None:
    with pytest.raises(
        ConfigError, match=r"a last entry at the target, 3 bits\. Fix: end the list with \[3, \.\.\.\], or change"
    ):
        custom((8, 0.5), (4, 0.5)).resolve(3, 100)


def test_stages_without_custom_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.stages = .* empty unless kind is custom"):
        ScheduleSpec("integer", ((4, 1.0),))


def test_unit_without_custom_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.unit = 'epochs' .* share, unless kind is custom"):
        ScheduleSpec("fractional", unit="epochs")


@pytest.mark.parametrize("total", [-1, 0, 1, 8])
def test_fewer_steps_than_stages_are_refused(total: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"train\.steps = {total} .* enough for 9 stages .* Fix: train longer or use fewer stages"
    ):
        ScheduleSpec().resolve(4, total)


def test_missing_total_is_refused_for_shares() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps = None .* a positive integer"):
        ScheduleSpec().resolve(4, None)


def test_total_that_disagrees_with_the_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps = 40 .* 37, the sum of the stages, or null"):
        custom((8, 7), (4, 30), unit="steps").resolve(4, 40)
    with pytest.raises(ConfigError, match=r"train\.steps = 40 .* 48, the sum"):
        custom((8, 1), (4, 3), unit="epochs").resolve(4, 40, steps_per_epoch=12)


@pytest.mark.parametrize("steps_per_epoch", [None, 0, -3])
def test_epochs_need_their_number_of_steps(steps_per_epoch: int | None) -> None:
    with pytest.raises(ConfigError, match=rf"steps_per_epoch = {steps_per_epoch} .* a positive integer"):
        custom((8, 1), (4, 3), unit="epochs").resolve(4, None, steps_per_epoch)


def test_stage_that_rounds_to_no_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="enough for 2 stages of at least one step"):
        custom((8, 0.01), (4, 3), unit="epochs").resolve(4, None, steps_per_epoch=12)


# --- learning rate


SCHEDULE = custom((8, 10), (6, 10), (4, 20), unit="steps").resolve(4, None)


def rates(kind: str, schedule: Schedule = SCHEDULE, **settings: float) -> list[float]:
    spec = LearningRateSpec(2.0, kind, **settings)
    return [spec.at(step, schedule) for step in range(schedule.total_steps)]


def cosine(progress: float) -> float:
    return 1 + math.cos(math.pi * progress)


def test_decay_last_is_constant_through_the_ramp_then_a_cosine() -> None:
    course = rates("decay_last")
    assert course[:20] == [2.0] * 20
    assert course[20:] == pytest.approx([cosine(i / 20) for i in range(20)])


def test_constant_stays_at_the_peak() -> None:
    assert rates("constant") == [2.0] * 40


def test_cosine_falls_over_the_whole_run() -> None:
    assert rates("cosine") == pytest.approx([cosine(i / 40) for i in range(40)])


def test_restart_is_one_cosine_per_stage() -> None:
    expected = [cosine(i / 10) for i in range(10)] * 2 + [cosine(i / 20) for i in range(20)]
    assert rates("restart") == pytest.approx(expected)


def test_cooldown_holds_the_peak_at_8_bits_and_falls_with_the_width() -> None:
    schedule = custom((8, 10), (6, 10), (4, 20), unit="steps").resolve(4, None)
    expected = [2.0] * 10 + [2 * (1 - i / 30) for i in range(30)]
    assert rates("cooldown", schedule) == pytest.approx(expected)
    wider = custom((16, 4), (8, 6), (7.5, 30), unit="steps").resolve(7.5, None)
    assert rates("cooldown", wider) == pytest.approx(expected)


def test_cooldown_of_a_single_width_falls_from_the_end_of_the_warm_up() -> None:
    schedule = ScheduleSpec("constant").resolve(4, 40)
    assert rates("cooldown", schedule) == pytest.approx([2 * (1 - i / 40) for i in range(40)])
    course = rates("cooldown", schedule, warmup_steps=8)
    assert course[7] == course[8] == max(course) == 2.0
    assert course[8:] == pytest.approx([2 * (1 - i / 32) for i in range(32)])


def test_cooldown_to_8_bits_falls_in_the_last_stage() -> None:
    schedule = custom((16, 10), (8, 30), unit="steps").resolve(8, None)
    assert rates("cooldown", schedule) == pytest.approx([2.0] * 10 + [2 * (1 - i / 30) for i in range(30)])


def test_shapes_of_a_cooldown_share_their_ends() -> None:
    schedule = ScheduleSpec("constant").resolve(4, 40)
    courses = {shape: rates("cooldown", schedule, cooldown_shape=shape) for shape in CooldownShape}
    assert courses["cosine"] == pytest.approx(rates("cosine", schedule))
    assert courses["sqrt"][10] == pytest.approx(2 * (1 - math.sqrt(0.25)))
    assert courses["linear"] == rates("cooldown", schedule)
    for shape in CooldownShape:
        spec = LearningRateSpec(1.0, "cooldown", final_ratio=0.1, cooldown_shape=shape)
        assert spec.at(0, schedule) == 1.0
        assert spec.at(40, schedule) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", list(LearningRateKind))
@pytest.mark.parametrize("schedule_kind", NAMED)
@pytest.mark.parametrize("warmup_steps", [0, 7, 1000])
@pytest.mark.parametrize("final_ratio", [0, 0.1, 1])
def test_rate_stays_between_zero_and_the_peak(
    kind: str, schedule_kind: str, warmup_steps: int, final_ratio: float
) -> None:
    schedule = ScheduleSpec(schedule_kind).resolve(4, 200)
    spec = LearningRateSpec(3e-4, kind, warmup_steps, final_ratio)
    for step in range(205):
        assert 0 <= spec.at(step, schedule) <= 3e-4
        if warmup_steps == 0:
            assert spec.at(step, schedule) >= final_ratio * 3e-4 * (1 - 1e-12)


def test_decay_is_continuous_where_the_last_stage_starts() -> None:
    schedule = ScheduleSpec().resolve(4, 2500)
    first = schedule.stages[-1].first_step
    spec = LearningRateSpec(1.0)
    assert spec.at(first - 1, schedule) == spec.at(first, schedule) == 1.0
    largest_jump = max(abs(spec.at(i, schedule) - spec.at(i + 1, schedule)) for i in range(2499))
    assert largest_jump < 2 / schedule.stages[-1].num_steps


@pytest.mark.parametrize("kind", ["decay_last", "cosine", "restart"])
def test_cosine_ends_at_the_final_ratio(kind: str) -> None:
    course = rates(kind, final_ratio=0.25)
    assert min(course) == course[-1]
    assert 0.5 < course[-1] < 0.52
    assert LearningRateSpec(2.0, kind, final_ratio=0.25).at(10_000, SCHEDULE) == 0.5


def test_warmup_rises_linearly_from_the_first_step() -> None:
    assert rates("constant", warmup_steps=4)[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


# A cooldown begins where the warm-up ends, so it alone is not a product of the two.
MULTIPLIED = [kind for kind in LearningRateKind if kind is not LearningRateKind.COOLDOWN]


@given(step=st.integers(0, 39), warmup=st.integers(1, 60), kind=st.sampled_from(MULTIPLIED))
def test_warmup_multiplies_the_course(step: int, warmup: int, kind: LearningRateKind) -> None:
    plain = LearningRateSpec(1.0, kind).at(step, SCHEDULE)
    warm = LearningRateSpec(1.0, kind, warmup).at(step, SCHEDULE)
    assert warm == pytest.approx(plain * min(1, (step + 1) / warmup), abs=1e-15)


def test_single_stage_decays_from_the_start() -> None:
    schedule = ScheduleSpec("constant").resolve(4, 40)
    assert rates("decay_last", schedule) == pytest.approx(rates("cosine", schedule))


@given(peak=st.floats(1e-9, 10), factor=st.sampled_from([2.0, 4.0]), step=st.integers(0, 39))
def test_rate_is_proportional_to_the_peak(peak: float, factor: float, step: int) -> None:
    assume(peak * factor < 100)
    assert LearningRateSpec(peak * factor).at(step, SCHEDULE) == factor * LearningRateSpec(peak).at(step, SCHEDULE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peak": 0}, r"learning_rate\.peak = 0 .* a positive number"),
        ({"peak": -1e-4}, r"learning_rate\.peak = -0\.0001 "),
        ({"peak": math.nan}, r"learning_rate\.peak = nan "),
        ({"peak": math.inf}, r"learning_rate\.peak = inf "),
        ({"warmup_steps": -1}, r"learning_rate\.warmup_steps = -1 .* 0 or more"),
        ({"final_ratio": 1.5}, r"learning_rate\.final_ratio = 1\.5 .* \[0, 1\]"),
        ({"final_ratio": -0.1}, r"learning_rate\.final_ratio = -0\.1 "),
        ({"final_ratio": math.nan}, r"learning_rate\.final_ratio = nan "),
        (
            {"kind": "cooldown", "cooldown_shape": "steep"},
            r"learning_rate\.cooldown_shape.*steep.*linear, sqrt, cosine",
        ),
        ({"cooldown_shape": "sqrt"}, r"learning_rate\.cooldown_shape = 'sqrt' .* null with kind decay_last"),
    ],
)
def test_impossible_learning_rate_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LearningRateSpec(**settings)


@pytest.mark.parametrize("unknown", [lambda: ScheduleSpec("cubic"), lambda: LearningRateSpec(1.0, "linear")])
def test_unknown_kind_is_refused(unknown) -> None:
    with pytest.raises(ValueError, match="allowed is"):
        unknown()


def test_names_become_enums() -> None:
    spec = custom((4, 1), unit="steps")
    assert spec.kind is ScheduleKind.CUSTOM
    assert spec.unit is StageUnit.STEPS
    assert ScheduleSpec("custom", [[8, 0.5], [4, 0.5]]).stages == ((8.0, 0.5), (4.0, 0.5))


def test_warmup_as_a_share_is_warmup_in_steps() -> None:
    share, steps = (
        [LearningRateSpec(1.0, "cosine", **warmup).at(step, SCHEDULE) for step in range(40)]
        for warmup in ({"warmup_share": 0.25}, {"warmup_steps": 10})
    )
    assert share == steps


@pytest.mark.parametrize(
    "changes", [{"warmup_share": 1.0}, {"warmup_share": -0.1}, {"warmup_share": 0.1, "warmup_steps": 3}]
)
def test_an_impossible_warmup_share_is_named(changes: dict) -> None:
    with pytest.raises(ConfigError, match="warmup_share"):
        LearningRateSpec(**changes)


@pytest.mark.parametrize("kind", NAMED)
def test_the_grid_of_stages_changes_neither_widths_nor_steps(kind: ScheduleKind) -> None:
    own, final = (ScheduleSpec(kind, grid=grid).resolve(4, 100) for grid in ("own", "final"))
    assert own.stages == final.stages
    assert (own.on_final_grid, final.on_final_grid) == (False, True)


def test_an_unknown_grid_of_stages_is_named() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.grid"):
        ScheduleSpec(grid="other")


# --- several widths, automatic


def test_several_widths_have_one_stage_whose_width_turns() -> None:
    schedule = ScheduleSpec("several", widths=(8, 6, 5, 4)).resolve(4, 10)
    assert bits_of(schedule) == (4,) and schedule.served_bits == (8, 6, 5, 4) and schedule.target_bits == 4
    assert [schedule.stage_at(step).bits for step in range(10)] == [8, 6, 5, 4, 8, 6, 5, 4, 8, 6]
    assert LearningRateSpec(kind=LearningRateKind.DECAY_LAST).at(5, schedule) == pytest.approx(5e-5)


def test_sampled_widths_are_the_seeds_own_and_even() -> None:
    spec = ScheduleSpec("several", widths=(8, 4), order="sampled")
    drawn = [[spec.resolve(4, 400, seed=seed).stage_at(step).bits for step in range(400)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 160 < drawn[0].count(8) < 240


def test_an_automatic_schedule_begins_at_the_top_and_knows_its_end() -> None:
    schedule = ScheduleSpec("automatic").resolve(4, 50)
    assert bits_of(schedule) == (8,) and schedule.total_steps == 50 and not schedule.is_decided
    assert schedule.choices == TABLE_4_BITS and schedule.target_bits == 4
    narrowed = schedule.narrowed(1, 6).narrowed(12, 4)
    assert bits_of(narrowed) == (8, 6, 4) and steps_of(narrowed) == (1, 11, 38) and narrowed.is_decided


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "several"}, r"schedule.widths = \(\) .*two or more that fall"),
        ({"kind": "several", "widths": (4,)}, "schedule.widths.*two or more"),
        ({"kind": "several", "widths": (4, 8)}, "schedule.widths.*fall to the target"),
        ({"kind": "several", "widths": (8, 1)}, "bits = 1"),
        ({"kind": "several", "widths": (8, 4), "grid": "final"}, "schedule.grid.*own for several"),
        ({"kind": "several", "widths": (8, 4), "order": "random"}, "schedule.order.*in_turn, sampled"),
        ({"kind": "constant", "widths": (8, 4)}, "schedule.widths.*unless kind is several"),
        ({"kind": "constant", "order": "sampled"}, "schedule.order.*unless kind is several"),
        ({"kind": "automatic", "grid": "final"}, "schedule.grid.*own for automatic"),
        ({"kind": "constant", "automatic": AutomaticSpec(rise=3)}, "schedule.automatic.*unless kind is automatic"),
    ],
)
def test_impossible_widths_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleSpec(**values)


def test_several_widths_end_at_the_target_and_automatic_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"schedule.widths.*a last entry at the target, 3 bits"):
        ScheduleSpec("several", widths=(8, 4)).resolve(3, 10)
    for name, value in (("ramp_share", 1), ("rise", 0.5), ("window_share", 0), ("gain", 1)):
        with pytest.raises(ConfigError, match=f"schedule.automatic.{name} = {value}"):
            AutomaticSpec(**{name: value})
