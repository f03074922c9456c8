"""``--where``: a condition on the columns of a table, read with ast and never run as Python."""

from __future__ import annotations

import ast
import functools
import operator
from ast import unparse
from collections.abc import Callable
from typing import Any

import pandas as pd
from pandas.api import types

from peftsweep.errors import InputError, suggest

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
ALLOWED = "columns, numbers, texts, comparisons, in, is None, and, or, not, + - * / and parentheses"


def where(table: pd.DataFrame, expression: str) -> pd.Series[bool]:
    """For each row, whether ``expression`` holds: ``choices.quant == '4bit' and eval_info.gsm8k.accuracy > 0.3``.

    A dotted name is a column; of a score, ``.value`` may be left out; a part that is no Python name stands in
    brackets, ``eval_info['my-eval'].accuracy``. A comparison with a missing value is neither true nor false, as in
    SQL; what is not true in the end is left out.

    Raises:
        InputError: it cannot be read, names an unknown column, or compares a number with a text.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        found = _Condition(table).truth(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        why = str(error).splitlines()[0].removesuffix(" (<unknown>, line 1)")
        example = "such as --where \"choices.quant == '4bit' and config.method.r >= 8\""
        raise InputError(f"--where {expression}: cannot be read ({why}); must be a condition, {example}") from None
    return found.fillna(False).astype(bool)


class _Condition:
    """Evaluates the nodes of an expression on a table: a column gives a Series, a constant itself."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table

    def truth(self, node: ast.expr) -> pd.Series[Any]:
        """A condition, as true, false or missing for each row."""
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(value) for value in node.values]
            return functools.reduce(operator.and_ if isinstance(node.op, ast.And) else operator.or_, parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.truth(node.operand)
        if isinstance(node, ast.Compare):
            return self._comparisons(node)
        value = self.value(node)
        if _kind(value) not in ("truth", None):
            raise InputError(
                f"--where: {unparse(node)} is {_article(value)} and no condition; compare it with something"
            )
        return self._column(value)

    def value(self, node: ast.expr) -> Any:
        """A column, a constant or what is computed from them."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
            return node.value
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
            return self._named(_name(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            try:
                return ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right))
            except ArithmeticError as error:
                raise InputError(f"--where: {unparse(node)}: {error}") from None
        if isinstance(node, ast.BoolOp | ast.Compare) or (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
        ):
            return self.truth(node)
        raise InputError(f"--where: {unparse(node)}: not understood; there are {ALLOWED}")

    def _number(self, node: ast.expr) -> Any:
        value = self.value(node)
        if _kind(value) not in ("number", None) or value is None:
            raise InputError(f"--where: {unparse(node)} is {_article(value)}, and is calculated with")
        return value.astype("Float64") if isinstance(value, pd.Series) else value

    def _comparisons(self, node: ast.Compare) -> pd.Series[Any]:
        sides = [node.left, *node.comparators]
        return functools.reduce(operator.and_, map(self._compare, sides, node.ops, sides[1:]))

    def _compare(self, left: ast.expr, how: ast.cmpop, right: ast.expr) -> pd.Series[Any]:
        if isinstance(how, ast.In | ast.NotIn):
            found = self._contained(left, right)
            return ~found if isinstance(how, ast.NotIn) else found
        first, second = self.value(left), self.value(right)
        if first is None or second is None:
            missing = self._column(second if first is None else first).isna().astype("boolean")
            if isinstance(how, ast.Is | ast.Eq):
                return missing
            if isinstance(how, ast.IsNot | ast.NotEq):
                return ~missing
            raise InputError(
                f"--where: {unparse(left)}, {unparse(right)}: None has no order; write is None or is not None"
            )
        if type(how) not in COMPARISONS:
            raise InputError("--where: is and is not stand before None only; write == or !=")
        _same_kind(left, first, right, second)
        if None in (_kind(first), _kind(second)):
            return self._column(None)
        return self._column(COMPARISONS[type(how)](first, second))

    def _contained(self, left: ast.expr, right: ast.expr) -> pd.Series[Any]:
        """``column in ('a', 'b')``, or ``'text' in column``."""
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            column, options = self._column(self.value(left)), [self.value(option) for option in right.elts]
            for option, node in zip(options, right.elts, strict=True):
                if isinstance(option, pd.Series):
                    raise InputError(f"--where: {unparse(node)}: a list holds numbers and texts, no columns")
                _same_kind(left, column, node, option)
            return column.isin(options).astype("boolean").mask(column.isna())
        text, column = self.value(left), self.value(right)
        if not isinstance(text, str) or not isinstance(column, pd.Series) or _kind(column) not in ("text", None):
            raise InputError(
                f"--where: {unparse(left)} in {unparse(right)}: in needs a list, or a text and a column of text"
            )
        return column.astype("string").str.contains(text, regex=False).astype("boolean")

    def _named(self, name: str) -> pd.Series[Any]:
        for column in (name, f"{name}.value"):
            if column in self.table:
                return self.table[column]
        known = [str(column) for column in self.table.columns]
        advice = suggest(name, known)
        if not advice.startswith("did"):  # all columns of a table are no help
            ending = [
                column for column in known if column.removesuffix(".value").endswith(f".{name.rpartition('.')[2]}")
            ]
            advice = suggest(name, ending[:8] or sorted({column.partition(".")[0] + ".*" for column in known}))
        raise InputError(f"--where: no column {name}; {advice}")

    def _column(self, value: Any) -> pd.Series[Any]:
        """A constant for every row; nothing but missing values becomes a column of truths."""
        condition = _kind(value) in ("truth", None)
        if not isinstance(value, pd.Series):
            value = pd.Series([pd.NA if value is None else value] * len(self.table), self.table.index)
        series: pd.Series[Any] = value
        return series.astype("boolean") if condition else series


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return f"{_name(node.value)}.{node.slice.value}"
    raise InputError(f"--where: {unparse(node)}: not understood; there are {ALLOWED}")


def _kind(value: Any) -> str | None:
    """``number``, ``text`` or ``truth``; None for what is missing altogether."""
    if isinstance(value, pd.Series):
        if types.is_bool_dtype(value.dtype):
            return "truth"
        if types.is_numeric_dtype(value.dtype):
            return "number"
        return None if value.isna().all() else "text"
    if value is None:
        return None
    return "truth" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def _same_kind(left: ast.expr, first: Any, right: ast.expr, second: Any) -> None:
    kinds = {_kind(first), _kind(second)} - {None}
    if len(kinds) > 1:
        raise InputError(f"--where: {unparse(left)} is {_article(first)}, {unparse(right)} is {_article(second)}")


def _article(value: Any) -> str:
    return {"number": "a number", "text": "a text", "truth": "true or false", None: "nothing"}[_kind(value)]
