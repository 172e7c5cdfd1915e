"""Laws of result tables."""

import json

import pytest

from fraqat.table import Table, format_value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (9999, "9999"),
        (10_000, "10,000"),
        (-1_234_567, "-1,234,567"),
        (0.123456, "0.1235"),
        (4.0, "4"),
        (5.5, "5.5"),
        (1e-7, "1e-07"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("W4A8", "W4A8"),
    ],
)
def test_value_is_written_for_people(value: object, text: str) -> None:
    assert format_value(value) == text


def test_table_aligns_numbers_right_and_words_left() -> None:
    table = Table("Results", ("name", "steps", "loss"), (("a", 5, 0.25), ("longer", 12_000, None)), ("one note",))
    assert str(table).splitlines() == [
        "Results",
        "name     steps  loss",
        "------  ------  ----",
        "a            5  0.25",
        "longer  12,000     -",
        "one note",
    ]


def test_lines_have_no_space_at_the_end() -> None:
    table = Table("T", ("a", "b"), (("x", "long text"), ("y", "z")))
    assert all(line == line.rstrip() for line in str(table).splitlines())


def test_table_without_rows_shows_its_headings() -> None:
    assert str(Table("Nothing", ("a", "bb"), ())).splitlines() == ["Nothing", "a  bb", "-  --"]


def test_json_has_one_object_per_row_with_the_values_themselves() -> None:
    table = Table("T", ("name", "loss", "ok"), (("a", 0.123456789, True), ("b", None, False)), ("note",))
    data = json.loads(json.dumps(table.to_json()))
    assert data == {
        "title": "T",
        "rows": [{"name": "a", "loss": 0.123456789, "ok": True}, {"name": "b", "loss": None, "ok": False}],
        "notes": ["note"],
    }


def test_row_of_another_length_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="zip"):
        Table("T", ("a", "b"), ((1,),)).to_json()


def test_cells_are_text() -> None:
    assert Table("T", ("a", "b"), ((1, None), (2.5, True))).to_cells() == [["1", "-"], ["2.5", "yes"]]


def test_transposing_turns_columns_into_rows_and_keeps_the_text() -> None:
    table = Table("t", ("model", "loss", "n"), (("a", 0.5, 20_000), ("b", None, 3)), ("note",))
    turned = table.transposed()
    assert turned.columns == ("model", "a", "b")
    assert turned.rows == (("loss", "0.5", "-"), ("n", "20,000", "3"))
    assert (turned.title, turned.notes) == ("t", ("note",))
