"""Which number a written answer says."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from peftsweep.evaluation.text.numerals import as_number, in_digits, same_number

SAYS = {
    50: ["50\\%", "50 percent", "50 %"],
    18: [
        "18,",
        "18 more",
        "18 fewer pens",
        "x_1 = 18",
        "f(3) = 18",
        r"18^\circ C",
        r"18\degree",
        r"18\,\text{cm}",
        "18;",
        "€18",
        "(18)",
        "x = 18",
        "9 + 9 = 18",
        "**18**",
        "1.8 \\times 10^1",
        "####18",
        "18 (eighteen)",
        "the answer is 18",
        "18 dollars",
        "18. So she makes 18",
        "x=18",
        "18€",
        "18 €",
        "€ 18",
        "US$18",
        "18 USD",
        "USD 18",
        "Rs. 18",
        "\\boxed{18}",
        "\\textbf{18}",
        "\\text{18 dollars}",
        "1.8 × 10^1",
        "1.8*10^{1}",
        "1.8×10¹",
        "1.8e1",
        "**18",
        "18**",
        "**18.**",
        "**$18**",
        "**18 dollars**",
        "**18** dollars",
        "*18*",
        "`18`",
        "_18_",
        "__18__",
        "'18'",
        '"18"',
        "“18”",
        "[18]",
        "(18) dollars",
        "18 (rounded to 2 places)",
        "18 dollars (see above)",
        "Total = 18",
        "Total cost: $18",
        "9 eggs * $2 = $18",
        "3 x 6 = 18",
        "\\frac{36}{2} = 18",
        "A = 1/2 * 6 * 6 = 18",
        "18 = x",
        "= 18",
        "x ≈ 18",
        "x == 18",
        "18 dollars in 7 days",
        "18 dollars, because 9 + 9 = 18",
        "18 - the total",
        "$18/hour",
        "18 m^2",
        "18 cm²",
        "18 square feet",
        "18°C",
        "18 °C",
        "+18",
        "exactly 18",
        "about 18 dollars",
        "18.0",
        "18.00 dollars",
        "18 apples left.",
        "18 eggs each day",
        "18!",
        "18?",
        "18:",
        "So the answer is $18.",
        "Answer: 18",
        "18 miles at 3 mph",
        "18 quarters",
        "18 a day",
        "9 + 9 = <<9+9=18>>18",
        "18 years old",
        "18~\\text{dollars}",
        "\\(18\\)",
        "18 cups of flour",
        "$ 18",
        "18 pairs of shoes",
        "18\\ \\text{m}^2",
        "(x) = 18",
        "$5 + $13 = $18",
        "2*(4+5) = 18",
        "20% of 90 = 18",
        "18 dollars for 3 hours",
        "18 s",
    ],
    1.5: ["1 1/2", "1½", "1 and 1/2"],
    1234.5: ["$1,234.50"],
    -5: ["-$5", "−5", "$-5", "(-5)"],
    12: ["12%", "12\\%"],
    3: ["3 km", "3km", "3 PM"],
    5: ["5 m", "5\\text{cm}"],
    90: ["90^\\circ"],
    1000: ["1,\\!000", "1e3", "£1,000.", "10^3"],
    -0.5: ["-\\frac{1}{2}"],
    2.5: ["5/2 cups", "2 1/2 cups"],
    1234: ["1 234", "1\u202f234,", "1{,}234", "1'234", "1,000 + 234 = 1,234"],
    1234567: ["12,34,567"],
    0.5: ["\\frac12", "½", "x = 1/2 = 0.5", ".5"],
    0.75: ["\\dfrac{3}{4}"],
    11.5: ["11\\frac{1}{2}"],
    -1.5: ["-1 1/2"],
    0.25: ["2.5 x 10^-1"],
    9: ["16 - 3 - 4 = 9 eggs"],
    60: ["60 km/h"],
    -18: ["-18", "–18", "negative 18"],
    -3: ["minus 3"],
    12345678901234567890: ["12345678901234567890"],
    7: ["007"],
    1200.5: ["Profit = $1,200.50."],
    18.5: ["18.5 hours"],
}
SAYS_NONE = [
    "",
    "x",
    "x+1",
    "3x",
    "3xy",
    "3 x",
    "3\\sqrt{2}",
    "2 pi",
    "\\frac{1}{2}x",
    "3+4i",
    "3 or 5",
    "3 million",
    "1,2",
    "2, 3",
    "(1,2)",
    "12-13",
    "1:2",
    "1/2/3",
    "1/0",
    "5 feet 6 inches",
    "2 dozen",
    "18 more than 3",
    "3 years and 2 months",
    "18 eggs and 3 chickens",
    "3:30",
    "3:30 pm",
    "2024-05-01",
    "3/4/2024",
    "5 May",
    "5 May 2024",
    "12 to 13",
    "12–13",
    "between 12 and 13",
    "10-12 dollars",
    "18 eggs, 3 chickens",
    "18 eggs and three chickens",
    "five feet",
    "5 hours 30 minutes",
    "5 feet six inches",
    "2 and a half",
    "3 out of 4",
    "2 hundred",
    "3 lakh",
    "2x = 18",
    "x = 3 or x = 18",
    "x = 3, y = 18",
    "x > 18",
    "x^2 = 18",
    "x + 1 = 18",
    "18 ± 2",
    "3,5",
    "1.234,50",
    "1.234.567",
    "5**2",
    "5 * 200",
    "5* 200",
    "2 (3)",
    "(3)(4)",
    "(18)/2",
    "18 19",
    "18, 19",
    "1. 18",
    "A) 18",
    "seven",
    "eighteen",
    "it is 7",
    "3%2",
    "2^5",
    "5'6\"",
    "18 or more",
    "18 eggs for Tom and 3 chickens for Mia",
    "18 + 2",
    "5 feet by 6 feet",
    "1 2 3",
    "$18 and $20",
    "18th",
    "Day 1: 18",
    "3 of 4",
    "5 feet and 6 inches",
    "18 dollars to 20 dollars",
    "1e999999999",
    "18/0",
    "3k",
    "18 = 9 + 9",
    "5 3/2",
    "two",
    "18 to 20",
    "3-4",
    "1,2345",
    "12,345,6",
    "x = 18 when y = 3",
    "1 dozen eggs",
    "18 dollars and 50 cents",
    "3.4.5",
    "--5",
    "between 3 and 18",
    "18 dollars or 20 dollars",
    "18; or 19",
    "18. Or 19",
    "Tom: 18, Mia: 3",
    "3 and 18",
    "nan",
    "inf",
    "3 > 2",
    "18-",
    "2 times 9",
    "7 over 2",
    "5 hundred dollars",
    "1/2/3 cups",
    "[1, 2]",
    "1 - 1/2",
    "18 not 19 but 20 or 21",
    "100 200 30",
    "9" * 5000,
    "1" + "0" * 400,
]


@pytest.mark.parametrize(("text", "value"), [(text, value) for value, texts in SAYS.items() for text in texts])
def test_a_text_that_says_one_number_is_that_number(text: str, value: float) -> None:
    assert as_number(text) == value


@pytest.mark.parametrize("text", SAYS_NONE, ids=lambda text: text[:20] or "nothing")
def test_a_text_that_says_several_numbers_a_term_or_a_multiple_is_none(text: str) -> None:
    assert as_number(text) is None


def test_whole_numbers_are_compared_exactly_and_others_but_for_rounding() -> None:
    assert not same_number(1234567890, 1234567891)
    assert not same_number(12345678901234567890, 12345678901234567891)
    assert not same_number(1, 0.9999999999)
    assert same_number(1 / 3, 0.3333333333)
    assert not same_number(1 / 3, 0.333)
    assert isinstance(as_number("1.8 x 10^1"), int)
    assert as_number("12,345,678,901,234,567,891") == 12345678901234567891
    assert [in_digits(n) for n in (12345678901234567891, 0.1 + 0.2)] == ["12345678901234567891", "0.3"]


@pytest.mark.parametrize("piece", ["(", "*", "1,", "1 ", "= ", "a:", "18 (", r"\\text{", "**a ", "18 and ", "x = "])
def test_no_text_takes_long_to_read(piece: str) -> None:
    start = time.perf_counter()
    as_number(piece * 2000)
    assert time.perf_counter() - start < 1.0


def test_the_documented_texts_are_the_numbers_that_docs_answers_says() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (Path(__file__).parents[2] / "docs" / "answers.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    assert len(rows) > 10
    for texts, documented in rows:
        for text in re.findall(r"`` (.+?) ``|`([^`]+)`", texts):
            number = as_number("".join(text))
            assert (number is None) == documented.startswith("none"), text
            values = [float(value) for value in re.findall(r"-?\d+(?:\.\d+)?", documented)]
            assert number is None or number in values or f"({in_digits(number)})" in texts, text
