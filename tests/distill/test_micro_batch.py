"""Laws of a step that does not fit: the same batches in smaller pieces give the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import ToyTask

from fraqat.distill import read_log
from fraqat.distill.micro_batch import is_out_of_memory, shares_of, split_batch
from fraqat.errors import ConfigError, DeviceMemoryError


class SmallDevice(ToyTask):
    """Holds a forward pass with gradients of so many samples."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.sizes = limit, list[int]()

    def split_inputs(self, inputs, num_parts: int):
        parts = split_batch(inputs, num_parts)
        return list(zip(parts, shares_of([len(part["x"]) for part in parts]), strict=True))

    def predict(self, model, inputs):
        if torch.is_grad_enabled():
            if len(inputs["x"]) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            self.sizes.append(len(inputs["x"]))
        return super().predict(model, inputs)


def run(make_distiller, folder: str, limit: int, **changes):
    distiller = make_distiller(
        folder=folder, task=SmallDevice(limit), on_out_of_memory="split", autocast="none", batch_size=8, **changes
    )
    return distiller, distiller.run()


@pytest.mark.parametrize("num_splits", [2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_pieces_give_the_gradients_of_the_whole_batch(make_distiller, num_splits: int, accumulation: int) -> None:
    """Up to the order of float32 sums, on the small difference of two outputs: 1e-4 of the largest gradient of a parameter."""
    distiller = make_distiller(task=SmallDevice(8), autocast="none", batch_size=8, accumulation=accumulation)
    parts = list(distiller.stream.next_parts())
    losses, gradients = [], []
    for pieces in (1, num_splits):
        losses.append(distiller._gradients_from_none(parts, pieces).mean)
        gradients.append([p.grad.clone() for p in distiller.student.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for whole, split in zip(*gradients, strict=True):
        assert (whole - split).abs().max() <= 1e-4 * whole.abs().max()


@pytest.mark.parametrize("limit", [4, 3, 1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_is_split_until_it_fits_and_records_it(
    make_distiller, tmp_path: Path, limit: int, accumulation: int
) -> None:
    split, _ = run(make_distiller, "split", limit, accumulation=accumulation)
    assert max(split.task.sizes) <= limit
    events = read_log(tmp_path / "split")
    part = 8 // accumulation
    expected = [] if part <= limit else [(0, {4: 4, 3: 2, 1: 1}[limit])]
    assert [(e["step"], e["samples"]) for e in events if e["event"] == "micro_batch"] == expected
    assert sum(e["event"] == "step" for e in events) == 18


def test_a_resumed_run_begins_with_the_pieces_that_fit(make_distiller) -> None:
    run(make_distiller, "run", 2)
    again = make_distiller(task=SmallDevice(2), on_out_of_memory="split", batch_size=8, autocast="none")
    again._resume()
    assert again.micro_batch.size == 2


def test_a_new_try_draws_the_same_dropout(make_distiller) -> None:
    """Out of memory in the first step alone is as if the run had begun with small pieces."""

    class After(SmallDevice):
        def predict(self, model, inputs):
            result = ToyTask.predict(self, model, inputs)
            if torch.is_grad_enabled() and len(inputs["x"]) > self.limit:
                raise torch.OutOfMemoryError("after drawing dropout")
            return result

    late = make_distiller(
        folder="late", task=After(2), on_out_of_memory="split", batch_size=8, dropout=0.3, autocast="none"
    )
    late.run()
    early = make_distiller(
        folder="early", task=SmallDevice(2), on_out_of_memory="split", batch_size=8, dropout=0.3, autocast="none"
    )
    early.run()
    for a, b in zip(late.student.parameters(), early.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("action", "limit", "words"), [("stop", 4, "on_out_of_memory: split"), ("split", 0, "A single")]
)
def test_what_cannot_be_split_stops_with_a_message(make_distiller, action: str, limit: int, words: str) -> None:
    distiller = make_distiller(task=SmallDevice(limit), on_out_of_memory=action, batch_size=8)
    with pytest.raises(
        DeviceMemoryError, match=f"out of memory at step 0 .*Tried to allocate 2.00 GiB.*{words}"
    ) as error:
        distiller.run()
    assert error.value.exit_code == 8


def test_a_task_that_cannot_split_is_refused(make_distiller) -> None:
    with pytest.raises(ConfigError, match=r"on_out_of_memory = 'split' .* split_inputs"):
        make_distiller(on_out_of_memory="split")


def test_other_errors_are_no_lack_of_memory() -> None:
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_a_batch_is_cut_once_and_shared_columns_stay_whole() -> None:
    batch = {"x": torch.arange(7), "names": list("abcdefg"), "ids": torch.arange(3)}
    parts = split_batch(batch, 3, frozenset({"ids"}))
    assert [len(part["x"]) for part in parts] == [2, 2, 3]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert [name for part in parts for name in part["names"]] == batch["names"]
    assert all(torch.equal(part["ids"], batch["ids"]) for part in parts)
    assert len(split_batch(batch, 99, frozenset({"ids"}))) == 7
    assert shares_of([0, 0]) == [0.5, 0.5]
