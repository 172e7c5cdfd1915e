"""Laws of packed codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fraqat.errors import ConfigError
from fraqat.numerics import pack_codes, unpack_codes


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[torch.Tensor, int, bool]:
    num_bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    low, high = (-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1) if signed else (0, 2**num_bits - 1)
    length, num_rows = draw(st.integers(1, 19)), draw(st.integers(1, 3))
    rows = draw(
        st.lists(
            st.lists(st.integers(low, high), min_size=length, max_size=length), min_size=num_rows, max_size=num_rows
        )
    )
    return torch.tensor(rows, dtype=torch.int8 if signed else torch.uint8), num_bits, signed


def packed_by_hand(row: list[int], num_bits: int) -> list[int]:
    """One big integer, the first code in its lowest bits."""
    number = sum((code & (2**num_bits - 1)) << (i * num_bits) for i, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * num_bits // 8), "little"))


@given(case=code_rows())
def test_unpack_undoes_pack(case: tuple[torch.Tensor, int, bool]) -> None:
    codes, num_bits, signed = case
    packed = pack_codes(codes, num_bits)
    back = unpack_codes(packed, num_bits, codes.shape[-1], signed=signed)
    assert packed.dtype is torch.uint8
    assert back.dtype is codes.dtype
    assert torch.equal(back, codes)


@given(case=code_rows())
def test_packed_bytes_are_one_little_endian_bit_stream(case: tuple[torch.Tensor, int, bool]) -> None:
    codes, num_bits, _ = case
    assert pack_codes(codes, num_bits).tolist() == [packed_by_hand(row, num_bits) for row in codes.tolist()]


def test_four_bit_codes_lie_low_nibble_first() -> None:
    assert pack_codes(torch.tensor([1, 2, -1, -8], dtype=torch.int8), 4).tolist() == [0x21, 0x8F]


def test_eight_bit_codes_are_the_bytes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, 8), codes)
    signed = codes.view(torch.int8)
    assert torch.equal(pack_codes(signed, 8), codes)
    assert torch.equal(unpack_codes(codes, 8, 256, signed=True), signed)


@pytest.mark.parametrize(("num_bits", "length", "num_bytes"), [(1, 9, 2), (3, 5, 2), (4, 7, 4), (5, 8, 5), (6, 3, 3)])
def test_odd_lengths_are_filled_with_zero_bits(num_bits: int, length: int, num_bytes: int) -> None:
    packed = pack_codes(torch.full((length,), 2**num_bits - 1, dtype=torch.uint8), num_bits)
    assert len(packed) == num_bytes
    assert sum(byte.bit_count() for byte in packed.tolist()) == num_bits * length


def test_leading_axes_are_kept() -> None:
    codes = torch.randint(-8, 8, (2, 3, 5), dtype=torch.int8)
    packed = pack_codes(codes, 4)
    assert packed.shape == (2, 3, 3)
    assert torch.equal(packed[1, 2], pack_codes(codes[1, 2], 4))
    assert torch.equal(unpack_codes(packed, 4, 5, signed=True), codes)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_wide_integers_with_small_codes_are_packed(dtype: torch.dtype) -> None:
    codes = torch.tensor([[-4, 3, 0]], dtype=dtype)
    assert unpack_codes(pack_codes(codes, 3), 3, 3, signed=True).tolist() == [[-4, 3, 0]]


def test_no_codes_give_no_bytes() -> None:
    packed = pack_codes(torch.zeros(3, 0, dtype=torch.int8), 4)
    assert packed.shape == (3, 0)
    assert unpack_codes(packed, 4, 0, signed=True).shape == (3, 0)


@pytest.mark.parametrize("num_bits", range(1, 8))
@pytest.mark.parametrize("which", ["too low", "too high", "signed and unsigned mixed"])
def test_code_that_does_not_fit_is_refused(num_bits: int, which: str) -> None:
    half = 2 ** (num_bits - 1)
    codes = {"too low": [-half - 1, 0], "too high": [0, 2 * half], "signed and unsigned mixed": [-1, half]}[which]
    with pytest.raises(ConfigError) as caught:
        pack_codes(torch.tensor([codes]), num_bits)
    assert str(caught.value) == (
        f"codes = {[min(codes), max(codes)]} is not possible: allowed is integers of {num_bits} bits. "
        "Fix: pack with more bits."
    )


@pytest.mark.parametrize("num_bits", [0, 9, -4])
def test_impossible_number_of_bits_is_refused(num_bits: int) -> None:
    match = rf"num_bits = {num_bits} .* 1 to 8\. Fix: store wider codes as int16 or int32"
    with pytest.raises(ConfigError, match=match):
        pack_codes(torch.zeros(4, dtype=torch.int8), num_bits)
    with pytest.raises(ConfigError, match=match):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), num_bits, 4, signed=True)


@pytest.mark.parametrize("num_bytes", [0, 2, 4])
def test_wrong_number_of_bytes_is_refused(num_bytes: int) -> None:
    with pytest.raises(ConfigError, match=rf"packed bytes per row = {num_bytes} .* 3\. Fix: write the file again"):
        unpack_codes(torch.zeros(2, num_bytes, dtype=torch.uint8), 4, 5, signed=True)
