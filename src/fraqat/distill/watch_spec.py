"""What is watched during training, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fraqat.errors import config_error
from fraqat.nn import STRICT_KEYS

NonFiniteAction = Literal["stop", "rewind", "lower_rate"]
OutOfMemory = Literal["stop", "split"]
WandbMode = Literal["online", "offline"]


@dataclass(frozen=True)
class NonFiniteSpec:
    """What is done when the loss, a gradient or a weight becomes NaN or infinite.

    Args:
        action: `stop` with a message; `rewind` to the newest checkpoint and compute the same steps again, for a fault of the
            machine that passes, go one checkpoint further back if it comes again by the same step, and stop where there is no
            older one; `lower_rate` rewinds and multiplies the learning rate by `rate_factor` from there on, and goes further
            back where two lower rates have not helped.
        rate_factor: In (0, 1).
        max_rewinds: Of one run; then it stops.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    action: NonFiniteAction = "stop"
    rate_factor: float = 0.5
    max_rewinds: int = 3

    def __post_init__(self) -> None:
        _check_choice("train.on_non_finite.action", self.action, NonFiniteAction)
        if not 0 < self.rate_factor < 1:
            raise config_error("train.on_non_finite.rate_factor", self.rate_factor, allowed="(0, 1)", fix="use 0.5")
        _check_at_least("train.on_non_finite.max_rewinds", self.max_rewinds, 1)


@dataclass(frozen=True)
class ProfileSpec:
    """Steps that torch.profiler records.

    Args:
        first_step: From 0; a few steps after a start are slower than the others.
        num_steps: The trace of one step of a large model takes 10 to 100 MB.
        memory: Record allocations too.
        shapes: Record the shapes of inputs too.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    first_step: int = 10
    num_steps: int = 2
    memory: bool = False
    shapes: bool = False

    def __post_init__(self) -> None:
        _check_at_least("train.profile.first_step", self.first_step, 0)
        _check_at_least("train.profile.num_steps", self.num_steps, 1)


@dataclass(frozen=True)
class WandbSpec:
    """Where Weights & Biases keeps the scalars of a run. Neither code nor git state is sent.

    Args:
        project: Its name there.
        entity: Team or user; None is the account's own.
        mode: `offline` keeps everything in the run's folder, for `wandb sync`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    project: str = "fraqat"
    entity: str | None = None
    mode: WandbMode = "online"

    def __post_init__(self) -> None:
        if not self.project:
            raise config_error("train.wandb.project", self.project, allowed="a name", fix="name the project")
        _check_choice("train.wandb.mode", self.mode, WandbMode)


def _check_choice(field_name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise config_error(field_name, value, allowed=", ".join(get_args(choices)), fix=f"correct {field_name}")


def _check_at_least(field_name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise config_error(field_name, value, allowed=f"{lowest} or more", fix=f"correct {field_name}")
