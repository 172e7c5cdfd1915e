"""Laws of the count of changed weight codes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fraqat import QuantSpec, WeightSpec, quantize_, set_bits_
from fraqat.distill import CodeFlips, read_log
from fraqat.nn import LayerFamilies, quantized_layers


def make_model(bits: float = 4.0, **weight: object) -> nn.Module:
    """Two layers whose codes are known: rows of whole numbers with the largest at the end of the grid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randint(-6, 7, layer.weight.shape).float())
            layer.weight[:, 0] = 7.0  # scale 1 at 4 bits
    quantize_(model, QuantSpec(WeightSpec(bits=bits, **weight)))
    return model


def test_a_known_change_is_counted_once() -> None:
    model = make_model()
    flips = CodeFlips(model, LayerFamilies({"A": ("0",)}))
    assert flips.count() == {}  # the first codes
    with torch.no_grad():
        model[0].weight[1, 2] += 1.0
        model[0].weight[3, 5] -= 2.0
        model[1].weight[0, 3] += 0.3  # rounds to the same code
    counts = flips.count()
    assert {name: (c.num_codes, c.num_changed) for name, c in counts.items()} == {"A": (32, 2), "-": (8, 0)}
    assert counts["A"].share == 2 / 32
    assert [c.num_changed for c in flips.count().values()] == [0, 0]


def test_a_change_that_is_taken_back_is_not_counted() -> None:
    model = make_model()
    flips = CodeFlips(model)
    flips.start()
    with torch.no_grad():
        model[0].weight[0, 1] += 3.0
        model[0].weight[0, 1] -= 3.0
    assert sum(c.num_changed for c in flips.count().values()) == 0


def test_a_new_scale_changes_codes_without_a_change_of_their_weights() -> None:
    model = make_model()
    flips = CodeFlips(model)
    flips.start()
    before = [layer.weight_quantizer.codes(layer.weight)[0].clone() for _, layer in quantized_layers(model)]
    with torch.no_grad():
        model[0].weight[2, 0] = 14.0
    after = [layer.weight_quantizer.codes(layer.weight)[0] for _, layer in quantized_layers(model)]
    expected = sum(int((old != new).sum()) for old, new in zip(before, after, strict=True))
    assert expected >= 3
    assert sum(c.num_changed for c in flips.count().values()) == expected


def test_a_layer_whose_width_changed_starts_again() -> None:
    model = make_model()
    flips = CodeFlips(model)
    flips.start()
    assert flips.is_current
    set_bits_(model, 6, where="0")
    assert not flips.is_current
    counts = flips.count()
    assert sum(c.num_codes for c in counts.values()) == 8  # the other layer alone
    assert flips.is_current
    with torch.no_grad():
        model[0].weight[0, 1] = -model[0].weight[0, 1] - 1.0
    assert sum(c.num_changed for c in flips.count().values()) == 1


@pytest.mark.parametrize("spec", [{"bits": 16.0}, {"bits": 8.0, "symmetric": False}, {"bits": 30.0}])
def test_wide_codes_are_compared_in_full(spec: dict) -> None:
    model = make_model(**spec)
    flips = CodeFlips(model)
    flips.start()
    with torch.no_grad():
        model[0].weight[1, 2] *= 0.5
        model[0].weight[1, 3] = 6.9
    _, layer = next(iter(quantized_layers(model)))
    assert sum(c.num_changed for c in flips.count().values()) == 2
    assert layer.weight_quantizer.codes(layer.weight)[0].abs().max() > 127


@pytest.mark.parametrize("multiplier_changes", [False, True])
def test_integer_group_scales_count_codes_not_multiples(multiplier_changes: bool) -> None:
    model = make_model(granularity="group", group_size=4, group_scale="integer")
    flips = CodeFlips(model)
    flips.start()
    before = model[0].weight_quantizer.codes(model[0].weight)[0].clone()
    with torch.no_grad():
        model[0].weight[1, :4] *= 0.5 if multiplier_changes else 1.0
    expected = int((model[0].weight_quantizer.codes(model[0].weight)[0] != before).sum())
    assert sum(c.num_changed for c in flips.count().values()) == expected


def test_a_weight_that_is_not_a_number_stops_nothing() -> None:
    model = make_model()
    flips = CodeFlips(model)
    flips.start()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    assert sum(c.num_codes for c in flips.count().values()) == 40


def codes_events(folder: Path) -> list[dict]:
    return [event for event in read_log(folder) if event["event"] == "codes"]


def test_logging_changes_nothing_that_is_trained(make_distiller, tmp_path: Path) -> None:
    states = []
    for folder, logs in (("with", True), ("without", False)):
        distiller = make_distiller(steps=18, folder=folder, log_code_flips=logs)
        distiller.run()
        states.append(copy.deepcopy(distiller.student.state_dict()))
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert codes_events(tmp_path / "with")
    assert not codes_events(tmp_path / "without")


def test_events_come_every_so_many_steps_and_name_what_they_compare_with(make_distiller, tmp_path: Path) -> None:
    distiller = make_distiller(steps=18, log_code_flips=True, validate_every=5)
    distiller.run()
    events = codes_events(tmp_path / "run")
    stages = [event["step"] for event in read_log(tmp_path / "run") if event["event"] == "stage"]
    assert [event["step"] + 1 for event in events] == [5, 10, 15, 18]
    for event, earlier in zip(events, [0, 5, 10, 15], strict=True):
        assert event["since_step"] == max(earlier, *(step for step in stages if step <= event["step"]))
        assert event["num_codes"] == 8 * 16 + 16 * 4
        assert event["shares"]["all"] == event["num_changed"] / event["num_codes"]
        assert set(event["shares"]) == {"all", "-"}
    assert events[-1]["num_changed"] > 0


def test_a_resumed_run_has_every_event_once(make_distiller, tmp_path: Path) -> None:
    def crash(record) -> None:
        if record.step + 1 == 11:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        make_distiller(steps=18, log_code_flips=True, validate_every=4, on_step=crash).run()
    make_distiller(steps=18, log_code_flips=True, validate_every=4).run()
    events = codes_events(tmp_path / "run")
    assert [event["step"] + 1 for event in events] == [4, 8, 12, 16, 18]
    assert events[2]["since_step"] >= 8


def test_tensorboard_gets_the_shares(make_distiller, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    make_distiller(steps=18, log_code_flips=True, validate_every=6, tensorboard=True).run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"codes/all", "codes/-"} <= set(events.Tags()["scalars"])
    logged = [event["shares"]["all"] for event in codes_events(tmp_path / "run")]
    assert [scalar.value for scalar in events.Scalars("codes/all")] == pytest.approx(logged)
    assert sys.modules.get("tensorflow") is None
