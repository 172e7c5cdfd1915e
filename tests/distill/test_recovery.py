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


def break_weight_silently(distiller, after: int, fails_at: int) -> None:
    """A weight changes once after a step, as by a flipped bit, and the gradient of a later step is NaN for it."""
    weight, left = distiller.student[0].weight, [True]

    def on_step(record) -> None:
        if record.step == after and left:
            left.clear()
            with torch.no_grad():
                weight[0, 0] += 9.0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        is_broken = distiller.step == fails_at and weight[0, 0] > 6.0
        return torch.full_like(gradient, float("nan")) if is_broken else gradient

    distiller.on_step = on_step
    weight.register_hook(hook)


@pytest.mark.parametrize(
    ("after", "fails_at", "kept", "places"),
    [(6, 10, 2, [4]), (6, 8, 2, [4]), (6, 13, 3, [4]), (1, 6, 2, [0])],
    ids=["one back", "at the checkpoint", "two back", "to the start"],
)
def test_a_checkpoint_written_after_the_fault_is_passed_over(
    make_distiller, tmp_path: Path, after: int, fails_at: int, kept: int, places: list[int]
) -> None:
    options = {"num_checkpoints_kept": kept, "keep_best": False}
    whole = make_distiller(folder="whole", **options)
    whole.run()
    said: list[str] = []
    hit = make_distiller(folder="hit", on_non_finite=NonFiniteSpec("rewind"), warn=said.append, **options)
    break_weight_silently(hit, after, fails_at)
    hit.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(hit).values(), weights(whole).values(), strict=True))
    events = read_log(tmp_path / "hit")
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(18))
    last = [e for e in events if e["event"] == "rewind"][-1]
    assert ([last["step"]], last["failed_step"]) == (places, fails_at)
    assert last["passed_over"] == places[0] + 4
    assert f"before that of step {last['passed_over']}" in said[-1]
    assert {path.name for path in (tmp_path / "hit" / "checkpoints").iterdir()} == {
        f"step-{step:08d}" for step in (12, 16, 18)[-kept:]
    }


def test_a_killed_run_does_not_go_on_from_a_checkpoint_that_was_passed_over(make_distiller) -> None:
    class KillError(Exception):
        pass

    hit = make_distiller(on_non_finite=NonFiniteSpec("rewind"), keep_best=False)
    break_weight_silently(hit, 6, 10)
    break_weight = hit.on_step

    def on_step(record) -> None:
        break_weight(record)
        if hit.recovery.num_rewinds == 2:
            raise KillError

    hit.on_step = on_step
    with pytest.raises(KillError):
        hit.run()
    again = make_distiller(on_non_finite=NonFiniteSpec("rewind"), keep_best=False)
    assert again.store.load_latest().step == 4
    assert (again.store.folder / "rewound-step-00000008").is_dir()


def poison_last_validation(distiller, times: int, above_rate: float = 0.0) -> list[int]:
    """The held-out loss at the end is NaN, so often, while the rate is above a limit; counts the validations there."""
    validate, seen = distiller.validate, []

    def poisoned() -> float:
        loss = validate()
        if distiller.step != distiller.schedule.total_steps:
            return loss
        seen.append(distiller.step)
        rate = distiller.recovery.rate_factor * distiller.spec.learning_rate.peak
        return float("nan") if len(seen) <= times and rate > above_rate else loss

    distiller.validate = poisoned
    return seen


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_a_passing_fault_in_the_last_validation_leaves_the_same_weights(make_distiller, options) -> None:
    whole = make_distiller(folder="whole", **options)
    wanted = whole.run()
    hit = make_distiller(folder="hit", on_non_finite=NonFiniteSpec("rewind"), **options)
    seen = poison_last_validation(hit, times=1)
    assert hit.run().validation_loss == wanted.validation_loss
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(weights(hit).values(), weights(whole).values(), strict=True))


def test_a_fault_that_stays_in_the_last_validation_ends_the_run(make_distiller) -> None:
    hit = make_distiller(on_non_finite=NonFiniteSpec("rewind"), keep_best=False)
    seen = poison_last_validation(hit, times=99)
    with pytest.raises(
        NonFiniteLossError, match=r"the held-out loss is nan at step 18.* came again at the same step"
    ) as error:
        hit.run()
    assert "after a rewind to step 18 and step 16" in str(error.value) and "lower_rate" in str(error.value)
    assert len(seen) == 3  # at the end, again, and after the steps from the checkpoint before


def test_a_lower_rate_after_the_last_step_trains_the_last_steps_anew(make_distiller, tmp_path: Path) -> None:
    """From the checkpoint after the last step there is nothing that a lower rate could change."""
    hit = make_distiller(on_non_finite=NonFiniteSpec("lower_rate"), keep_best=False)
    peak = hit.spec.learning_rate.peak
    poison_last_validation(hit, times=99, above_rate=0.6 * peak)
    hit.run()
    rates = [e["learning_rate"] for e in read_log(tmp_path / "run") if e["event"] == "step"]
    usual = [hit.spec.learning_rate.at(step, hit.schedule) for step in range(18)]
    assert rates == [*usual[:16], *(0.5 * rate for rate in usual[16:])]


def test_a_rate_falls_twice_before_an_older_checkpoint_is_taken(make_distiller, tmp_path: Path) -> None:
    hit = make_distiller(on_non_finite=NonFiniteSpec("lower_rate", max_rewinds=4), keep_best=False)
    peak = hit.spec.learning_rate.peak
    poison(hit, 10, times=99, above_rate=0.2 * peak)
    hit.run()
    rates = [e["learning_rate"] for e in read_log(tmp_path / "run") if e["event"] == "step"]
    usual = [hit.spec.learning_rate.at(step, hit.schedule) for step in range(18)]
    assert rates == [*usual[:4], *(0.125 * rate for rate in usual[4:])]


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
