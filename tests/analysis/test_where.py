"""Conditions on the columns of a table."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from peftsweep.analysis.table.where import where
from peftsweep.errors import InputError

TABLE = pd.DataFrame(
    {
        "trial": pd.array(["a", "b", "c", "d"], dtype="string"),
        "choices.quant": pd.array(["4bit", "none", "4bit", None], dtype="string"),
        "config.method.r": pd.array([8, 16, 32, None], dtype="Int64"),
        "config.method.target_modules": pd.array(['["q"]', '["q", "v"]', None, '["v"]'], dtype="string"),
        "config.label": pd.array([None] * 4, dtype=object),
        "eval_info.gsm8k.accuracy.value": pd.array([0.2, 0.4, 0.5, None], dtype="Float64"),
        "eval_info.my-eval.accuracy.value": pd.array([1, 0, 1, 0], dtype="Int64"),
        "memory.train.rss_peak": pd.array([10**9, 2 * 10**9, 3 * 10**9, None], dtype="Int64"),
        "train_info.reloads": pd.array([True, False, None, True], dtype="boolean"),
    }
)


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("choices.quant == '4bit' and eval_info.gsm8k.accuracy > 0.3", "c"),
        ("choices.quant == '4bit' or eval_info.gsm8k.accuracy.value > 0.3", "abc"),
        ("choices.quant != '4bit'", "b"),  # what is missing is neither the one nor the other
        ("not choices.quant == '4bit'", "b"),
        ("config.method.r in (8, 32)", "ac"),
        ("config.method.r not in [8, 32]", "b"),
        ("config.method.r is None", "d"),
        ("config.method.r is not None and not config.method.r < 16", "bc"),
        ("config.label is None", "abcd"),
        ("config.label == 'x' or config.label + 1 > 2", ""),
        ("config.label", ""),
        ("8 < config.method.r <= 32", "bc"),
        ("config.method.r == eval_info.gsm8k.accuracy * 40", "ab"),
        ("memory.train.rss_peak / 1e9 - 1 >= 2 ** 1", None),
        ("(memory.train.rss_peak - 1e9) / 1e9 >= 2", "c"),
        ("eval_info.gsm8k.accuracy > -1", "abc"),
        ("'\"v\"' in config.method.target_modules", "bd"),
        ("'v' not in config.method.target_modules", "a"),
        ("train_info.reloads", "ad"),
        ("not train_info.reloads", "b"),
        ("train_info.reloads == True", "ad"),
        ("eval_info['my-eval'].accuracy == 1", "ac"),
        ("(choices.quant == 'none' or config.method.r == 8) and trial < 'b'", "a"),
    ],
)
def test_a_condition_chooses_rows(expression: str, rows: str | None) -> None:
    if rows is None:
        with pytest.raises(InputError, match="not understood"):
            where(TABLE, expression)
    else:
        assert "".join(TABLE["trial"][where(TABLE, expression)]) == rows


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("choices.quatn == '4bit'", "no column choices.quatn; did you mean 'choices.quant'?"),
        ("quant == '4bit'", "no column quant; did you mean 'choices.quant'?"),
        ("accuracy > 0.5", "no column accuracy; there are: eval_info.gsm8k.accuracy.value, eval_info.my-eval"),
        ("zzz == 1", "no column zzz; there are: choices.*, config.*, eval_info.*"),
        ("config.method.r == '8'", "config.method.r is a number, '8' is a text"),
        ("config.method.r in (8, 'x')", "config.method.r is a number, 'x' is a text"),
        ("choices.quant > 3", "choices.quant is a text, 3 is a number"),
        ("choices.quant * 2 == 4", "choices.quant is a text, and is calculated with"),
        ("choices.quant and config.method.r", "choices.quant is a text and no condition"),
        ("config.method.r > None", "None has no order"),
        ("config.method.r is 8", "is and is not stand before None only"),
        ("config.method.r in choices.quant", "in needs a list, or a text and a column of text"),
        ("config.method.r > 1 / 0", "1 / 0: division by zero"),
        ("config.method.r =", "cannot be read (invalid syntax); must be a condition, such as --where "),
        ("", "cannot be read"),
        ("__import__('os').system('true')", "not understood"),
        ("(lambda: 1)()", "not understood"),
        ("trial.__class__.__mro__ == 1", "no column trial.__class__.__mro__"),
        ("[x for x in trial] == 1", "not understood"),
        ("f'{trial}' == 'a'", "not understood"),
        ("(" * 500 + "1" + ")" * 500, "cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(expression: str, problem: str) -> None:
    with pytest.raises(InputError) as raised:
        where(TABLE, expression)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nothing_of_an_expression_is_run() -> None:
    ran: list[Any] = []
    for expression in ("ran.append(1)", "trial.map(print) == 1", "trial[ran.append(1)] == 1"):
        with pytest.raises(InputError):
            where(TABLE, expression)
    assert ran == []
