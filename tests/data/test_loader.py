"""Laws of the shuffled batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from fraqat.data.captioned import DataSpec, held_out_prompts
from fraqat.data.color_digits import held_out_combinations
from fraqat.data.loader import RowSource, ShuffledBatches, TensorRows
from fraqat.errors import ConfigError


def rows(num: int = 10) -> TensorRows:
    return TensorRows({"i": torch.arange(num), "x": torch.arange(num).float() * 10})


def take(stream, num: int) -> list[list[int]]:
    return [batch["i"].tolist() for batch in itertools.islice(iter(stream), num)]


def test_every_row_comes_once_per_epoch_in_a_new_order() -> None:
    batches = take(ShuffledBatches(rows(), 5, seed=0), 6)
    epochs = [batches[i] + batches[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_columns_stay_together_and_the_order_is_the_seeds() -> None:
    batch = next(iter(ShuffledBatches(rows(), 5, seed=0)))
    assert torch.equal(batch["x"], batch["i"].float() * 10)
    assert take(ShuffledBatches(rows(), 5, seed=0), 4) == take(ShuffledBatches(rows(), 5, seed=0), 4)
    assert take(ShuffledBatches(rows(), 5, seed=0), 4) != take(ShuffledBatches(rows(), 5, seed=1), 4)


@pytest.mark.parametrize("num_seen", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [3, 5])
def test_a_saved_position_goes_on_with_the_next_batch(num_seen: int, batch_size: int) -> None:
    whole = take(ShuffledBatches(rows(), batch_size, seed=3), 12)
    stream = ShuffledBatches(rows(), batch_size, seed=3)
    iterator = iter(stream)
    for _ in range(num_seen):
        next(iterator)
    state = stream.state_dict()
    resumed = ShuffledBatches(rows(), batch_size, seed=3)
    resumed.load_state_dict(state)
    assert take(resumed, 12 - num_seen) == whole[num_seen:]


def test_batches_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(ShuffledBatches(rows(), 3, seed=0), 5)
    assert torch.equal(torch.rand(3), expected)


def test_a_row_source_hands_out_both_sides_in_the_parts_of_a_task() -> None:
    source = RowSource(rows(10), rows(4))
    assert source.num_train == 10 and source.steps_per_epoch(3) == 3 and source.steps_per_epoch(20) == 1
    assert [batch["i"].tolist() for batch in source.validation_batches(3)] == [[0, 1, 2], [3]]
    assert source.first_rows(2).columns["i"].tolist() == [0, 1]
    assert take(source.train_stream(5, seed=0), 4) == take(ShuffledBatches(rows(10), 5, seed=0), 4)
    with pytest.raises(
        ConfigError, match=r"train.batch_size = 11 .* allowed is at most data.num_train = 10. Fix: use less"
    ):
        source.train_stream(11, seed=0)


def test_prompts_are_held_out_varied_and_all_used_before_one_repeats() -> None:
    num = len(held_out_combinations())
    prompts = held_out_prompts(DataSpec(), 2 * num)
    assert len(set(prompts[:num])) == num
    assert prompts[num:] == prompts[:num]
    assert len({prompt.split()[1] for prompt in prompts[:8]}) >= 5
