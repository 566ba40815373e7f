"""Text that users chose, made safe for a line, a plot and Markdown."""

import pytest

from report import text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a name of 10 %", "a name of 10 %"),
        ("two\nlines\tand\r\x1b[0m", r"two\nlines\tand\r\x1b[0m"),
        ("\u202eright to left\u200f", r"\u202eright to left\u200f"),
        ("caf\udce9", r"caf\udce9"),
        ("实验\u3000一", "实验 一"),
    ],
)
def test_one_line(given, shown):
    assert text.one_line(given) == shown


@pytest.mark.parametrize(
    ("given", "width", "shown"),
    [
        ("abcdefgh", 8, "abcdefgh"),
        ("abcdefgh", 7, "abc…fgh"),
        ("abcdefgh", 4, "a…gh"),
        ("注意力实验一", 12, "注意力实验一"),
        ("注意力实验一", 9, "注意…验一"),
    ],
)
def test_shortening_in_the_middle(given, width, shown):
    assert text.shorten(given, width) == shown
    assert text.num_columns(shown) <= width


def test_names_that_differ_in_the_middle_stay_apart():
    names = ["a" * 30 + number + "b" * 30 for number in ("1", "2")]
    shown = text.labels(names, 20)
    assert len(set(shown)) == 2


@pytest.mark.parametrize(
    ("given", "escaped"),
    [
        ("2d_cardinal, step 1", "2d_cardinal, step 1"),
        ("a|b\nc", r"a\|b\\nc"),
        ("*_first_* __init__", r"\*\_first\_\* \_\_init\_\_"),
        ("`x` <b> &lt; [a](b) ~~c~~ $d$", r"\`x\` \<b> \&lt; \[a\](b) \~\~c\~\~ \$d\$"),
    ],
)
def test_markdown(given, escaped):
    assert text.markdown(given) == escaped


@pytest.mark.parametrize(
    ("given", "shown"), [("ls -l", "`ls -l`"), ("a `b` ``c", "``` a `b` ``c ```")]
)
def test_code(given, shown):
    assert text.code(given) == shown
