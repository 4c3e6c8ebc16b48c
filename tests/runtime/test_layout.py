"""Tables and sentences in the columns that a terminal has."""

import pytest

from cpmix_cli.runtime.layout import prose, table_lines
from cpmix_cli.runtime.text import width_of

HEADER = ("rarer class", ">images", "more frequent class", ">images", ">confusions", ">%")
ROWS = [["cat", "8", "dog", "88", "15", "27"], ["a maine coon", "6", "great white shark", "8", "13", "100"]]


def test_headings_are_broken_at_words_before_anything_else() -> None:
    assert table_lines(HEADER, ROWS) == [
        "rarer class   images  more frequent class  images  confusions    %",
        "------------  ------  -------------------  ------  ----------  ---",
        "cat                8  dog                      88          15   27",
        "a maine coon       6  great white shark         8          13  100",
    ]
    assert table_lines(HEADER, ROWS, width=66) == table_lines(HEADER, ROWS)
    assert table_lines(HEADER, ROWS, width=65) == [
        "                      more frequent",
        "rarer class   images  class              images  confusions    %",
        "------------  ------  -----------------  ------  ----------  ---",
        "cat                8  dog                    88          15   27",
        "a maine coon       6  great white shark       8          13  100",
    ]


def test_texts_are_broken_next_and_numbers_never() -> None:
    assert table_lines(HEADER, ROWS, width=58)[-4:] == [
        "-----------  ------  ------------  ------  ----------  ---",
        "cat               8  dog               88          15   27",
        "a maine           6  great white        8          13  100",
        "coon                 shark",
    ]


def test_columns_without_room_follow_below_beside_the_first_one() -> None:
    lines = table_lines(("run", *(f">number {i}" for i in range(5))), [["a", *["1234.5678"] * 5]], width=40)
    assert lines == [
        "run   number 0   number 1   number 2",
        "---  ---------  ---------  ---------",
        "a    1234.5678  1234.5678  1234.5678",
        "",
        "run   number 3   number 4",
        "---  ---------  ---------",
        "a    1234.5678  1234.5678",
    ]


def test_a_word_longer_than_its_column_is_broken_after_a_mark() -> None:
    lines = table_lines(("recipe", "what"), [["digits/cross-entropy", "as cifar100-lt/class-balanced-focal"]], width=45)
    assert lines[2:] == ["digits/cross-entropy  as cifar100-lt/class-", "                      balanced-focal"]


@pytest.mark.parametrize("width", [30, 44, 60, 80, 140])
def test_lines_fit_and_no_word_is_lost(width: int) -> None:
    names = ["\u5bff\u53f8 \u30e9\u30fc\u30e1\u30f3", "pickup truck", "x" * 30, "e\u0301clair au chocolat"]
    rows = [[name, "12.34", names[-1 - i], "7"] for i, name in enumerate(names)]
    lines = table_lines(
        ("true", ">%", "predicted", ">images"), rows, title="a title of many words to break", width=width
    )
    assert all(width_of(line) <= width for line in lines)
    words = "".join(lines).replace(" ", "")
    for name in names:
        assert "".join(name.split()[0]) in words or width < 60
    assert words.count("12.34") == 4


def test_sentences_are_broken_at_spaces_and_keep_their_indent() -> None:
    assert prose(["  one two three", "a/long/path/that/stays"], 10) == [
        "  one two",
        "  three",
        "a/long/path/that/stays",
    ]
    assert prose(["one two three"], None) == ["one two three"]
