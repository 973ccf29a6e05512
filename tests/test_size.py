from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtylog.errors import InvalidArgumentError
from dirtylog.size import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("64MiB", 64 << 20),
        ("64M", 64 << 20),
        ("64MB", 64_000_000),
        ("3GiB", 3 << 30),
        ("2TiB", 2 << 40),
        ("1PB", 10**15),
        ("1.5G", 3 << 29),
        ("0.5KiB", 512),
        ("2.0", 2),
        (" 64 MiB ", 64 << 20),
        ("64mib", 64 << 20),
        ("64MIB", 64 << 20),
        ("007", 7),
    ],
)
def test_a_size_with_or_without_a_unit(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_a_number_is_its_own_size() -> None:
    assert parse_size(12345) == 12345


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1.001KB", 1001), ("4.035KB", 4035), ("8.3MB", 8_300_000), ("9007199254740993.0", (1 << 53) + 1)]
)
def test_a_decimal_fraction_is_exact(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@given(thousandths=st.integers(0, 10**9))
@settings(deadline=None)
def test_any_thousandths_of_a_kilobyte_are_bytes(thousandths: int) -> None:
    assert parse_size(f"{thousandths // 1000}.{thousandths % 1000:03d}KB") == thousandths


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "MiB",
        "64XiB",
        "64 Mi B",
        "6 4",
        "-1",
        "+1",
        "1e6",
        "0x10",
        ".5K",
        "1.K",
        "1,5K",
        "1_000",
        "inf",
        "nan",
        "64MiB!",
        "\N{ARABIC-INDIC DIGIT ONE}K",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="write a number of bytes") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["1.5", "0.1KiB", "1.0001KB", "0.3B"])
def test_part_of_a_byte_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="whole number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 400 + ".0"], ids=["whole", "a fraction"])
def test_a_number_too_long_to_be_a_size_is_refused_as_one(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1 MiB"),
        ((1 << 20) + 1, "1.0 MiB"),
        (64 << 20, "64 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1 TiB"),
        (5 << 39, "2.5 TiB"),
        (1 << 50, "1024 TiB"),
        (-2048, "-2 KiB"),
        (0.25, "0 B"),
    ],
)
def test_a_size_for_people(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize(("nbytes", "text"), [(1023.9, "1.0 KiB"), ((1 << 20) - 1, "1.0 MiB"), ((1 << 30) - 1, "1.0 GiB")])
def test_no_size_is_1024_of_a_unit_that_has_a_larger(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


@given(nbytes=st.integers(0, 1 << 60), unit=st.sampled_from([1, 1 << 10, 1 << 20, 1 << 30, 1 << 40]))
@settings(deadline=None)
def test_what_is_formatted_parses_to_nearly_the_same(nbytes: int, unit: int) -> None:
    nbytes = nbytes // unit * unit
    number, name = format_size(nbytes).split()

    assert abs(float(number) * parse_size(f"1{name}") - nbytes) <= nbytes / 20
