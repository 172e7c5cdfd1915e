"""The bit width as a function of training progress: the paper's Table 4, its ablations, and schedules of our own."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from fraqat.errors import config_error, parse_choice
from fraqat.nn import STRICT_KEYS
from fraqat.numerics import Grid

# Table 4 of arXiv 2510.14823 for a target of 4 bits: 8, 7, 6 (1 epoch each), then these distances above the target
# (1, 1, 2, 2, 2 epochs), then the target (14): 25 epochs in all.
_TABLE_4_DISTANCES = ((1.5, 1.0), (1.0, 1.0), (0.75, 2.0), (0.5, 2.0), (0.25, 2.0))
_TABLE_4_TARGET_EPOCHS = 14.0
_TABLE_4_EPOCHS = 25.0
HIGHEST_BITS = 8
"""Where ramps begin; weights of so many bits are nearly as good as weights that are not quantized."""


class ScheduleKind(StrEnum):
    """Named schedules, each ending at the target width.

    `fractional`: Table 4; for a target other than 4 bits its distances above the target are kept. `integer`: 8, 7, 6, 5, 4.
    `simple`: 16, 8, 4. `constant`: the target only (vanilla QAT). `custom`: the stages given. `several`: one of `widths` each
    step, so that the same weights serve all. `automatic`: training chooses of Table 4's widths; see `AutomaticSpec`.
    """

    FRACTIONAL = "fractional"
    INTEGER = "integer"
    SIMPLE = "simple"
    CONSTANT = "constant"
    CUSTOM = "custom"
    SEVERAL = "several"
    AUTOMATIC = "automatic"


class WidthOrder(StrEnum):
    """Which of several widths a step trains. `in_turn`: one after the other, from the widest. `sampled`: drawn at random, each
    as likely."""

    IN_TURN = "in_turn"
    SAMPLED = "sampled"


class StageUnit(StrEnum):
    """What the second number of a custom stage counts."""

    SHARE = "share"
    EPOCHS = "epochs"
    STEPS = "steps"


class StageGrid(StrEnum):
    """What a width above the target rounds to. `own`: a grid of that width (Eq. 1 and 2). `final`: the target's grid, of whose
    error the width decides the share, 2^-(width - target)."""

    OWN = "own"
    FINAL = "final"


@dataclass(frozen=True)
class Stage:
    """One width and the optimizer steps [first_step, first_step + num_steps) that train at it."""

    index: int
    bits: float
    first_step: int
    num_steps: int

    @property
    def end_step(self) -> int:
        """First step after the stage."""
        return self.first_step + self.num_steps


@dataclass(frozen=True)
class AutomaticSpec:
    """How training chooses its own stages.

    A stage ends when the mean training loss of a window is no longer below that of the window before by `gain`. The loss of the
    step's batch is then measured at every narrower width, and the narrowest one follows whose loss is at most `rise` times that
    at the present width, or else the next one. The first choice is made after the first step, which trains at 8 bits, and
    begins the ramp.

    Args:
        ramp_share: Largest share of the steps above the target; when it is spent, the target follows.
        rise: Factor, 1 or more, by which the loss may rise at a change of the width.
        window_share: Length of a window as a share of the steps; at least two steps.
        gain: Relative fall of the loss from window to window that keeps a stage going.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    ramp_share: float = 0.25
    rise: float = 2.0
    window_share: float = 0.02
    gain: float = 0.05

    def __post_init__(self) -> None:
        for name, is_possible, allowed in (
            ("ramp_share", 0 < self.ramp_share < 1, "between 0 and 1"),
            ("rise", 1 <= self.rise < math.inf, "1 or more"),
            ("window_share", 0 < self.window_share < 1, "between 0 and 1"),
            ("gain", 0 <= self.gain < 1, "0 or more, below 1"),
        ):
            if not is_possible:
                raise config_error(f"schedule.automatic.{name}", getattr(self, name), allowed=allowed, fix="correct it")


@dataclass(frozen=True)
class ScheduleSpec:
    """A bit-width schedule before the length of the run is known.

    Args:
        kind: A named schedule, or `custom`.
        stages: Only with `custom`: (bits, length), each of another width than the one before; the last entry is the target.
            A stage may lie below the target, so that training comes from below.
        unit: What the lengths count: shares of the run (they sum to 1), epochs, or steps.
        grid: What the widths above the target round to.
        widths: Only with `several`: two or more, falling to the target.
        order: Only with `several`: which width a step trains.
        automatic: Only with `automatic`: how the stages are chosen.

    Raises:
        ConfigError: A width that is repeated, impossible widths or lengths, shares that do not sum to 1.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    kind: ScheduleKind = ScheduleKind.FRACTIONAL
    stages: tuple[tuple[float, float], ...] = ()
    unit: StageUnit = StageUnit.SHARE
    grid: StageGrid = StageGrid.OWN
    widths: tuple[float, ...] = ()
    order: WidthOrder = WidthOrder.IN_TURN
    automatic: AutomaticSpec = field(default_factory=AutomaticSpec)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_choice("schedule.kind", self.kind, ScheduleKind))
        object.__setattr__(self, "grid", parse_choice("schedule.grid", self.grid, StageGrid))
        object.__setattr__(self, "unit", parse_choice("schedule.unit", self.unit, StageUnit))
        object.__setattr__(self, "stages", tuple((float(b), float(n)) for b, n in self.stages))
        object.__setattr__(self, "widths", tuple(float(bits) for bits in self.widths))
        object.__setattr__(self, "order", parse_choice("schedule.order", self.order, WidthOrder))
        self._check_widths()
        if self.kind is ScheduleKind.CUSTOM:
            self._check_stages()
        elif self.stages:
            raise config_error(
                "schedule.stages",
                self.stages,
                allowed="empty unless kind is custom",
                fix="set kind: custom or drop stages",
            )
        elif self.unit is not StageUnit.SHARE:
            raise config_error(
                "schedule.unit", self.unit.value, allowed="share, unless kind is custom", fix="set kind: custom"
            )

    def lengths(self, target_bits: float) -> tuple[tuple[float, float], ...]:
        """(bits, length) of every stage for a target width; lengths in `unit`, or relative for the named schedules.

        Raises:
            ConfigError: A custom schedule that does not end at `target_bits`.
        """
        match self.kind:
            case ScheduleKind.FRACTIONAL:
                ramp = _fractional_ramp(target_bits)
            case ScheduleKind.INTEGER:
                whole = [float(b) for b in range(HIGHEST_BITS, 0, -1) if b > target_bits]
                share = (_TABLE_4_EPOCHS - _TABLE_4_TARGET_EPOCHS) / max(1, len(whole))
                ramp = [(b, share) for b in whole]
            case ScheduleKind.SIMPLE:
                share = (_TABLE_4_EPOCHS - _TABLE_4_TARGET_EPOCHS) / 2
                ramp = [(b, share) for b in (16.0, 8.0) if b > target_bits]
            case ScheduleKind.CONSTANT:
                ramp = []
            case ScheduleKind.SEVERAL:
                self._check_target(self.widths[-1], target_bits, "schedule.widths", self.widths)
                ramp = []
            case ScheduleKind.AUTOMATIC:
                ramp = _fractional_ramp(target_bits)
            case ScheduleKind.CUSTOM:
                self._check_target(self.stages[-1][0], target_bits, "schedule.stages", self.stages)
                return self.stages
        return (*ramp, (target_bits, _TABLE_4_TARGET_EPOCHS))

    @staticmethod
    def _check_target(last: float, target_bits: float, name: str, value: object) -> None:
        if last != target_bits:
            raise config_error(
                name,
                value,
                allowed=f"a last entry at the target, {target_bits:g} bits",
                fix=f"end the list with [{target_bits:g}, ...], or change the lowest width of quantization",
            )

    def resolve(
        self, target_bits: float, total_steps: int | None, steps_per_epoch: int | None = None, seed: int = 0
    ) -> Schedule:
        """Fixes the steps of every stage; of an automatic schedule only its length.

        Args:
            target_bits: Width of the finished model.
            total_steps: Length of the run; None takes it from stages given in steps or epochs.
            steps_per_epoch: Needed for stages given in epochs.
            seed: Of widths that are drawn.

        Raises:
            ConfigError: Fewer steps than stages, or a total that disagrees with the stages' own lengths.
        """
        lengths = self.lengths(target_bits)
        if self.unit is StageUnit.EPOCHS and (steps_per_epoch is None or steps_per_epoch < 1):
            raise config_error(
                "steps_per_epoch",
                steps_per_epoch,
                allowed="a positive integer for stages in epochs",
                fix="give it, or more data",
            )
        if self.unit is not StageUnit.SHARE:
            factor = steps_per_epoch if self.unit is StageUnit.EPOCHS and steps_per_epoch else 1
            steps = [round(length * factor) for _, length in lengths]
            if total_steps is not None and sum(steps) != total_steps:
                raise config_error(
                    "train.steps",
                    total_steps,
                    allowed=f"{sum(steps)}, the sum of the stages, or null",
                    fix="drop train.steps",
                )
        else:
            if total_steps is None:
                raise config_error("train.steps", None, allowed="a positive integer", fix="set train.steps")
            steps = _apportion(total_steps, [length for _, length in lengths])
        if min(steps) < 1:
            raise config_error(
                "train.steps",
                total_steps,
                allowed=f"enough for {len(steps)} stages of at least one step",
                fix="train longer or use fewer stages, as schedule.kind: constant with its one",
            )
        if self.kind is ScheduleKind.AUTOMATIC:
            whole = Stage(0, lengths[0][0], 0, sum(steps))
            return Schedule((whole,), choices=tuple(bits for bits, _ in lengths), automatic=self.automatic)
        firsts = [sum(steps[:i]) for i in range(len(steps))]
        stages = tuple(Stage(i, lengths[i][0], firsts[i], steps[i]) for i in range(len(steps)))
        return Schedule(
            stages, on_final_grid=self.grid is StageGrid.FINAL, widths=self.widths, order=self.order, seed=seed
        )

    def _check_widths(self) -> None:
        is_several = self.kind is ScheduleKind.SEVERAL

        def check(name: str, is_possible: bool, allowed: str) -> None:
            if not is_possible:
                value = getattr(self, name)
                raise config_error(f"schedule.{name}", value, allowed=allowed, fix=f"correct {name} or kind")

        is_automatic = self.kind is ScheduleKind.AUTOMATIC
        check("order", is_several or self.order is WidthOrder.IN_TURN, "left out unless kind is several")
        check("grid", not (is_several or is_automatic) or self.grid is StageGrid.OWN, f"own for {self.kind.value}")
        check("automatic", is_automatic or self.automatic == AutomaticSpec(), "left out unless kind is automatic")
        for bits in self.widths:
            Grid(bits)
        is_falling = list(self.widths) == sorted(set(self.widths), reverse=True)
        check("widths", is_several or not self.widths, "left out unless kind is several")
        check("widths", not is_several or (len(self.widths) > 1 and is_falling), "two or more that fall to the target")

    def _check_stages(self) -> None:
        def fail(allowed: str, fix: str) -> None:
            raise config_error("schedule.stages", [list(stage) for stage in self.stages], allowed=allowed, fix=fix)

        if not self.stages:
            fail("at least one [bits, length] for kind: custom", "add stages")
        for bits, _ in self.stages:
            Grid(bits)
        if any(later[0] == earlier[0] for earlier, later in zip(self.stages, self.stages[1:], strict=False)):
            fail("another width in each stage than in the one before", "join the stages of one width")
        if any(not math.isfinite(length) or length <= 0 for _, length in self.stages):
            fail("positive lengths", "correct the second number of each stage")
        total = sum(length for _, length in self.stages)
        if self.unit is StageUnit.SHARE and not math.isclose(total, 1.0, abs_tol=1e-6):
            fail(f"shares that sum to 1 (they sum to {total:g})", "scale the shares, or set unit: epochs or steps")


@dataclass(frozen=True)
class Schedule:
    """The stages of one run. Iterate over it, or ask for the stage of a step.

    Attributes:
        stages: In order.
        on_final_grid: Widths above the target are shares of the final grid's error; see `StageGrid`.
        widths: Several widths that steps of the one stage train, falling to the target; empty for other schedules.
        order: Which of them a step trains.
        seed: Of those that are drawn.
        choices: Of an automatic schedule: falling widths, of which `stages` has those that were chosen so far.
        automatic: How it chooses; None for other schedules.
    """

    stages: tuple[Stage, ...]
    on_final_grid: bool = False
    widths: tuple[float, ...] = ()
    order: WidthOrder = WidthOrder.IN_TURN
    seed: int = 0
    choices: tuple[float, ...] = ()
    automatic: AutomaticSpec | None = None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].end_step

    def stage_at(self, step: int) -> Stage:
        """The stage that trains step `step`, counted from 0; the last one for any later step.

        With several widths it has that of the step.
        """
        stage = next((stage for stage in self.stages if step < stage.end_step), self.stages[-1])
        return replace(stage, bits=self._width_at(step)) if self.widths else stage

    def _width_at(self, step: int) -> float:
        if self.order is WidthOrder.SAMPLED:
            return random.Random(f"width {self.seed} {step}").choice(self.widths)  # noqa: S311
        return self.widths[step % len(self.widths)]

    @property
    def target_bits(self) -> float:
        """Width of the finished model."""
        return self.choices[-1] if self.choices else self.stages[-1].bits

    @property
    def served_bits(self) -> tuple[float, ...]:
        """Widths that the finished model serves, the target last."""
        return self.widths or (self.target_bits,)

    @property
    def is_decided(self) -> bool:
        """Whether all stages are known; those of an automatic schedule are once the target is reached."""
        return self.stages[-1].bits == self.target_bits

    def narrowed(self, step: int, bits: float) -> Schedule:
        """An automatic schedule that goes on at `bits` from `step` on, to the end of the run if nothing else is chosen.

        Args:
            step: First step of the new stage, after the first step of the last one.
            bits: Of `choices`, below the present width.
        """
        last = self.stages[-1]
        assert bits in self.choices and bits < last.bits and last.first_step < step < self.total_steps
        ended = replace(last, num_steps=step - last.first_step)
        new = Stage(last.index + 1, bits, step, self.total_steps - step)
        return replace(self, stages=(*self.stages[:-1], ended, new))

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)


def _fractional_ramp(target_bits: float) -> list[tuple[float, float]]:
    """Table 4 above the target; for a target other than 4 bits the fractional part keeps its distance to the target."""
    close = [(target_bits + distance, epochs) for distance, epochs in _TABLE_4_DISTANCES]
    whole = [(float(b), 1.0) for b in range(HIGHEST_BITS, 0, -1) if b > close[0][0]]
    return [(b, epochs) for b, epochs in (*whole, *close) if b <= HIGHEST_BITS]


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `total` (largest remainder), none of them 0 if that is possible."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: exact[i] - parts[i], reverse=True)
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    while min(parts) < 1 < max(parts):
        parts[parts.index(max(parts))] -= 1
        parts[parts.index(0)] += 1
    return parts
