"""Laws of what follows a NaN: back to the newest checkpoint, to the same weights, or a stop that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fraqat.distill import NonFiniteSpec, read_log
from fraqat.errors import ConfigError, NonFiniteLossError


def poison(distiller, at: int, times: int = 1, above_rate: float = 0.0) -> None:
    """The gradient of the first layer becomes NaN at a step, so often, while the rate is above a limit."""
    left = [times]

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        rate = distiller.recovery.rate_factor * distiller.spec.learning_rate.peak
        if distiller.step != at or not left[0] or rate <= above_rate:
            return gradient
        left[0] -= 1
        return torch.full_like(gradient, float("nan"))

    distiller.student[0].weight.register_hook(hook)


def weights(distiller) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in distiller.student.state_dict().items()}


@pytest.mark.parametrize("at", [0, 2, 5, 17])
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "accumulation": 2}])
def test_a_passing_fault_leaves_the_same_weights(make_distiller, tmp_path: Path, at: int, options) -> None:
    whole = make_distiller(folder="whole", dropout=0.2, **options)
    whole.run()
    hit = make_distiller(folder="hit", dropout=0.2, on_non_finite=NonFiniteSpec("rewind"), **options)
    poison(hit, at)
    result = hit.run()
    assert result.num_steps == 18
    assert all(torch.equal(a, b) for a, b in zip(weights(hit).values(), weights(whole).values(), strict=True))
    events = read_log(tmp_path / "hit")
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(18))
    (rewind,) = [e for e in events if e["event"] == "rewind"]
    assert (rewind["step"], rewind["failed_step"], rewind["rate_factor"]) == (at // 4 * 4, at, 1.0)


def test_the_same_fault_again_stops_and_says_what_to_do(make_distiller) -> None:
    distiller = make_distiller(on_non_finite=NonFiniteSpec("rewind"))
    poison(distiller, 6, times=9)
    with pytest.raises(NonFiniteLossError, match=r"came again at the same step .* lower_rate") as error:
        distiller.run()
    assert error.value.exit_code == 5
    assert make_distiller().store.load_latest().step == 4


def test_a_lower_rate_holds_from_the_rewind_on_and_after_a_resume(make_distiller, tmp_path: Path) -> None:
    spec = NonFiniteSpec("lower_rate", rate_factor=0.5)
    distiller = make_distiller(on_non_finite=spec)
    peak = distiller.spec.learning_rate.peak
    poison(distiller, 6, times=9, above_rate=0.3 * peak)
    distiller.run()
    rates = [e["learning_rate"] for e in read_log(tmp_path / "run") if e["event"] == "step"]
    usual = [distiller.spec.learning_rate.at(step, distiller.schedule) for step in range(18)]
    assert rates == [*usual[:4], *(0.25 * rate for rate in usual[4:])]
    again = make_distiller(on_non_finite=spec)
    again._resume()
    assert (again.recovery.rate_factor, again.recovery.num_rewinds) == (0.25, 2)


def test_rewinds_are_limited(make_distiller) -> None:
    distiller = make_distiller(on_non_finite=NonFiniteSpec("lower_rate", max_rewinds=2))
    poison(distiller, 6, times=99)
    with pytest.raises(NonFiniteLossError, match="after 2 rewinds too"):
        distiller.run()


def test_weights_that_are_not_finite_are_never_saved(make_distiller) -> None:
    distiller = make_distiller()

    def break_weight(record) -> None:
        if record.step == 3:  # before the checkpoint after step 4
            with torch.no_grad():
                distiller.student[3].weight[0, 0] = float("nan")

    distiller.on_step = break_weight
    with pytest.raises(NonFiniteLossError, match=r"a weight is not finite after the update .* 3\.weight"):
        distiller.run()
    assert make_distiller().store.is_empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "ignore"}, "on_non_finite.action = 'ignore' .* stop, rewind, lower_rate"),
        ({"rate_factor": 1.0}, "rate_factor = 1.0"),
        ({"max_rewinds": 0}, "max_rewinds = 0 .* 1 or more"),
    ],
)
def test_impossible_settings_are_refused(changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NonFiniteSpec(**changes)
