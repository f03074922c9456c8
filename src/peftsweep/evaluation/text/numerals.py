"""The number that a written answer says, or None where it says none or several.

as_number("$1,234.50")            # 1234.5
as_number("9 + 9 = 18 eggs.")     # 18
as_number("18 eggs and 3 hens")   # None
"""

from __future__ import annotations

import math
import re
import unicodedata
from fractions import Fraction

LONGEST = 1000  # characters that are read of a text
MAX_DIGITS = 300  # of a number, and its largest power of ten: what is longer is no answer, and would take long

# LaTeX and markdown around an answer that do not change it.
MARKUP = (
    (r"\\([$%])", r"\1"),
    (r"\b[A-Z]{1,2}\$|\$", ""),
    (r"\\(?:text|textbf|textit|emph|underline|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[cdt]frac(?![A-Za-z])", r"\\frac"),
    (r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z]))", "°"),
    (r"\\!|\\(?:left|right|displaystyle)(?![A-Za-z])|\\[()\[\]]", ""),
    (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
    ("[\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}]", "-"),
    ("[\u200b-\u200d\u2060\ufeff]", ""),  # of no width
    (r"(?<![\w*])(\*{1,3})(?=\S)([^*]+)(?<=\S)\1(?![\w*])", r"\2"),  # markdown's emphasis
    (r"__|`", ""),
)
# What else is written in several ways; only numbers are read of the result.
PLAINER = (
    (r"\{,\}", ","),
    (
        r"(\d?)\s*\\frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d)(?!\d))",
        r"\1 \2\3/\4\5",
    ),
    (r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:times|cdot)(?![A-Za-z])|[×·∙⋅]", "*"),
    (r"\\approx(?![A-Za-z])|[≈≃≅]", "="),
    (r"<<[^<>]*>>", ""),  # GSM8K's marks for a calculator
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
BRACKETS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}
END = " .,;:!?*_#。．，、；：！？"  # what may follow a number and says nothing

LEAD = re.compile(
    r"""(?: \#+
    | (?:so|thus|hence|therefore)\b,?
    | (?:the\s+|my\s+)?(?:final\s+|correct\s+)?answer(?:\s+is|\s+would\s+be|\s*:|\s*=)+:?
    | (?:exactly|only|just|about|approximately|approx\.|around|roughly|(?:a\s+)?total\s+of)\b
    | [^\W\d_](?:[\w'’.-]|\ (?!\ ))*(?<![\d_]):  # "Total cost:"
    )\s*""",
    re.VERBOSE | re.IGNORECASE,
)
MONEY = r"(?:[€£¥₹]|(?:USD|EUR|GBP|INR|Rs\.?)(?![A-Za-z]))"
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+|\d{1,3}(?:['’_]\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
POWER = r"10\s*\^\s*[({]?\s*(?P<%s>[-+]?\d+)\s*[)}]?"
QUANTITY = re.compile(
    rf"""(?P<sign>[-+–]?)\s*(?:{MONEY}\s*(?P<inner_sign>[-+]?)\s*)?
    (?: (?P<whole>\d+)\s+(?:and\s+)?(?P<part>\d+)\s*/\s*(?P<of>\d+)(?![\d.,]*\d)
    | {POWER % "alone"}
    | (?P<number>{DECIMAL})(?: \s*[xX*]\s*{POWER % "power"} | \s*/\s*(?P<divisor>-?{DECIMAL}) )?
    )""",
    re.VERBOSE,
)

# A unit that may follow without a blank: letters that cannot be a product ("3km", but not "3xy").
GLUED = re.compile(rf"(?:[kcm]m|[km]g|ml|mph|kph|kWh|lbs?|hrs?|ft|oz|mins?|secs?|°\s?[CF]?|%|¢|{MONEY})(?!\w)")
# Words that make another number or a term of the one before them.
NO_UNIT = re.compile(
    r"""(?: and|or|to|by|times|plus|minus|mod|pi|sqrt|out|of\s+\d|over|divided|squared|cubed|factorial
    | (?:more|less|fewer)\s+than
    | tens|hundreds?|thousands?|millions?|billions?|trillions?|lakhs?|crores?|dozens?|scores?|gross|half|halves
    | mln|mil|mio|bn|mrd|tn
    | thirds|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths )\b""",
    re.VERBOSE | re.IGNORECASE,
)
# A unit in Chinese, Japanese or Korean, which may follow without a blank, and what makes another number of it.
EAST_ASIAN = re.compile(r"\s*[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]\D*")
EAST_ASIAN_NUMBER = re.compile(
    "[〇零一二三四五六七八九十百千万萬億亿兆两兩半打余餘多几幾数數或십백천만억조반]|以[上下内內]|分之|~|-"
)
MONTH = re.compile(
    r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)(?:uary|ruary|ch|il|e|y|ust|tember|ober|ember)?\b"
)
WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen"
    "|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|dozen|half"
)
ANOTHER = re.compile(rf"\d|\b(?:{WORDS})\b", re.IGNORECASE)
# What follows one of these words tells when, where or why, and may hold numbers: "18 dollars in 3 hours".
CIRCUMSTANCE = re.compile(
    r"\b(?:in|for|per|after|within|every|each|at|on|when|if|because|since|as|so|which|that|where)\b", re.IGNORECASE
)
SEVERAL = re.compile(rf"(?:,|;|\b(?:and|or|plus)\b)\s*(?:{ANOTHER.pattern})", re.IGNORECASE)
SENTENCE = re.compile(r"(?:[.!?;:]|,(?=\s+(?:because|since|as|so|which|where|not)\b)|\s[-–—])\s+(?=[^\W\d_]{2})")
REMARK = re.compile(r"\s\((?=[^()]*[^\W\d_]{2})[^()]*\)")  # "18 (eighteen)"; without a word it could be a product
UNIT_POWER = re.compile(r"(?<=[A-Za-z])(?:\s*\^)?\{?[23]\}?(?!\w)")

COMPARISON = re.compile(r"[<>≤≥≠±]|!=|\\(?:leq?|geq?|neq?|lt|gt|pm)(?![A-Za-z])")
SENTENCE_WORDS = re.compile(
    r"\b(?:and|or|when|if|then|where|for|with|while|but|not|vs|versus)\b|[;?!]|,(?!\d{3})", re.IGNORECASE
)
TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=\d)")
INDEX = re.compile(r"_\{?\w+\}?|(?<=[A-Za-z])\([^()]*\)")  # of a name, or what a function is of
VARIABLE = re.compile(r"(?<![^\W_])[^\W\d_](?![^\W_])|(?<=\d)[^\W\d_](?![^\W\d_])")


def as_number(text: str) -> int | float | None:
    """The value of a text that says one number, a whole number as an int of any size.

    It may carry currency, separators of thousands, a unit, a remark, an equation before it (``x = 18``), LaTeX and
    markdown; a percentage is its number (``12%`` is 12), and ``1 1/2`` is 1.5. None for several numbers or a
    quantity that the number alone does not say (``5 feet 6 inches``, ``2 dozen``, ``3-4``, ``3:30``), for terms
    (``3x``), and for decimal commas, which cannot be told from separators.
    """
    plainer = _plainer(text[:LONGEST])
    found = _quantity(plainer)
    return _right_side(plainer) if found is None else found


def same_number(one: float, other: float) -> bool:
    """Whether two numbers are equal: exactly, unless neither is whole; then but for rounding (1/3 and 0.3333333333)."""
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    return math.isclose(one, other)


def in_digits(number: float) -> str:
    """A number as text: a whole one with all its digits, another one in up to 15."""
    return str(number) if isinstance(number, int) else f"{number:.15g}"


def without_markup(text: str) -> str:
    """``text`` without the LaTeX and markdown that do not change an answer, in single blanks."""
    for pattern, replacement in MARKUP:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split())


def _plainer(text: str) -> str:
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda found: f"^{found[0].translate(SUPERSCRIPTS)}", text)
    text = re.sub("[\u00bc-\u00be\u2150-\u215e]", _vulgar_fraction, text)
    text = without_markup(text)
    for pattern, replacement in PLAINER:
        text = re.sub(pattern, replacement, text)
    before = ""
    while text != before:
        before, text = text, _unwrapped(text.strip().lstrip("*_:").rstrip(END).strip())
    return " ".join(text.split())


def _vulgar_fraction(found: re.Match[str]) -> str:
    return " " + unicodedata.normalize("NFKC", found[0]).replace("\N{FRACTION SLASH}", "/")


def _unwrapped(text: str) -> str:
    """Without words that lead to a number, and without brackets or quotation marks around it."""
    if lead := LEAD.match(text):
        return text[lead.end() :]
    if sign := re.match(r"(?:negative|minus)\s+(?=[\d.])", text, re.IGNORECASE):
        return f"-{text[sign.end() :]}"
    close = BRACKETS.get(text[:1])
    inner, found, rest = text[1:].partition(close or " ")
    if (
        close
        and found
        and (not rest.strip(END) or re.match(r"\s+[^\W\d_]", rest))
        and QUANTITY.fullmatch(inner.strip())
    ):
        return inner + rest
    return text


def _quantity(text: str) -> int | float | None:
    """The value of a text that begins with a number, if all that follows leaves it the only one."""
    found = QUANTITY.match(text)
    if found is None or not _is_unit(text[found.end() :]):
        return None
    return _value(found)


def _is_unit(rest: str) -> bool:
    """Whether ``rest``, what follows a number, is a unit, a remark or a new sentence: no other number and no term."""
    rest = REMARK.sub("", rest)
    glued = GLUED.match(rest)
    rest = UNIT_POWER.sub("", rest[glued.end() if glued else 0 :])
    if rate := re.match(r"\s*/\s*[^\W\d_]+", rest):
        rest = rest[rate.end() :]
    if (end := SENTENCE.search(rest)) and not NO_UNIT.match(rest, end.end()):
        rest = rest[: end.start()]
    rest = rest.rstrip(END)
    if not rest:
        return True
    if EAST_ASIAN.fullmatch(rest):
        return not EAST_ASIAN_NUMBER.search(rest)
    words = rest.strip()
    if not rest[0].isspace() or NO_UNIT.match(words) or MONTH.match(words):
        return False
    if not (re.match(r"[^\W\d_]{2}|[%°¢€£¥₹]|a\b", words) or re.fullmatch("[mgslhL]", words)):
        return False
    unit, circumstance = words, ""
    if found := CIRCUMSTANCE.search(words):
        unit, circumstance = words[: found.start()], words[found.start() :]
    return not (ANOTHER.search(unit) or re.search(r"[+*^=\\]", unit) or SEVERAL.search(circumstance))


def _value(found: re.Match[str]) -> int | float | None:
    """The number of a match of ``QUANTITY``."""
    if found["alone"]:
        value = _power("1", found["alone"])
    elif found["whole"]:
        top, bottom = int(found["part"][:MAX_DIGITS]), int(found["of"][:MAX_DIGITS])
        value = _decimal(found["whole"]) if top < bottom else None  # "5 3/2" is no mixed number
        value = None if value is None else value + Fraction(top, bottom)
    else:
        value, divisor = _power(found["number"], found["power"] or "0"), _decimal(found["divisor"] or "1")
        value = value / divisor if value is not None and divisor else None
    if value is None:
        return None
    if (found["sign"] in ("-", "–")) != (found["inner_sign"] == "-"):
        value = -value
    try:
        return value.numerator if value.denominator == 1 else float(value)
    except OverflowError:
        return None


def _power(text: str, power: str) -> Fraction | None:
    number = _decimal(text)
    return None if number is None or abs(int(power[:9])) > MAX_DIGITS else number * Fraction(10) ** int(power)


def _decimal(text: str) -> Fraction | None:
    digits, _, power = re.sub("[ ,'’_]", "", text).lower().partition("e")
    if len(digits) > MAX_DIGITS or len(power) > 4 or abs(int(power or 0)) > MAX_DIGITS:
        return None
    return Fraction(digits) * Fraction(10) ** int(power or 0)


def _right_side(text: str) -> int | float | None:
    """What an equation says: 18 in ``x = 18`` and ``9 + 9 = 18``, but nothing in ``2x = 18`` or ``x = 3 or x = 18``."""
    *left, right = (part.strip() for part in re.split("=+", text))
    if not left or COMPARISON.search(text) or not all(map(_is_side, left)):
        return None
    if re.fullmatch(r"[^\W\d_]", right) and len(left) == 1:  # "18 = x"
        return _quantity(left[0])
    return _quantity(right)


def _is_side(text: str) -> bool:
    """Whether a text can be the left side of an equation that says a number: a name, or arithmetic without unknowns."""
    if SENTENCE_WORDS.search(text := INDEX.sub("", text)):
        return False
    return not re.search(r"\d", text) or not VARIABLE.search(TIMES.sub("*", text))
