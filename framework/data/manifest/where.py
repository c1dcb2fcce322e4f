"""A filter over the manifest's columns, such as `motion > 0.2 and aesthetic > 4.5`.

The text is Python's syntax of comparisons, `and`, `or`, `not`, `in`, `+ - * /`, numbers and quoted
texts; it is read into an Arrow expression and never run. A clip that has no such score does not
pass a comparison with it.
"""

import ast
import difflib
import functools
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from framework.data.manifest.table import SCHEMA
from framework.printable import printable

# What a filter may ask beside the scores.
COLUMNS = ("num_frames", "fps", "height", "width", "size_bytes", "source", "shard", "key", "video")

MAX_CHARS = 10_000  # of a filter; Arrow walks what it is read into by recursion; chosen by hand

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}


def parse_where(text: str, scores: Sequence[str]) -> pc.Expression:
    """The filter as an expression for `pyarrow.Table.filter`.

    scores: the manifest's score columns. ValueError says what is wrong, and for an unknown name
    which is nearest.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(
            f"where={printable(text)!r} has more than {MAX_CHARS} characters; make it shorter, or "
            "give the clips a score that says it"
        )
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"where={text!r} cannot be read: {error}") from error
    if not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
        raise ValueError(f'where={text!r} compares nothing; try "height >= 480"')
    types = {name: pa.float64() for name in scores} | {n: SCHEMA.field(n).type for n in COLUMNS}
    try:  # whether Arrow can compare these types
        found = _Reader(text, (*scores, *COLUMNS)).condition(node)
        pa.schema(types).empty_table().filter(found)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"where={text!r} cannot be reckoned: {printable(error)}") from error
    return found


class _Reader:
    def __init__(self, text: str, names: tuple[str, ...]) -> None:
        self.text = text
        self.names = names

    def condition(self, node: ast.expr) -> pc.Expression:
        """What is true or false."""
        match node:
            case ast.BoolOp(op=op, values=values):
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                return functools.reduce(join, map(self.condition, values))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                pairs = zip(ops, pairwise([left, *rights]), strict=True)
                parts = [self._comparison(op, *pair) for op, pair in pairs]
                return functools.reduce(operator.and_, parts)
        raise self._wrong(node)

    def _comparison(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List | ast.Tuple):
            values = [self._constant(value) for value in right.elts]
            found = _expression(self._value(left)).isin(values)
            return found if isinstance(op, ast.In) else ~found
        if type(op) not in _COMPARE:
            raise self._wrong(right)
        return _COMPARE[type(op)](*(_expression(self._value(side)) for side in (left, right)))

    def _value(self, node: ast.expr) -> Any:
        """A column, a constant, or what is reckoned of them."""
        match node:
            case ast.Name(id=name):
                if name not in self.names:
                    near = difflib.get_close_matches(name, self.names, 1)
                    hint = f"did you mean {printable(near[0])}?" if near else ""
                    have = printable(", ".join(self.names), 2000)
                    raise ValueError(
                        f"where={self.text!r}: no column {name!r}; {hint} There are {have}"
                    )
                return pc.field(name)
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
                sides = [self._value(left), self._value(right)]
                if isinstance(op, ast.Div):  # of whole numbers Arrow would drop the rest
                    sides[0] = _expression(sides[0]).cast("double")
                return _ARITHMETIC[type(op)](*map(_expression, sides))
        return self._constant(node)

    def _constant(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | None):
                raise self._wrong(node)
            case ast.Constant(value=int() | float() | str() as value):
                return self._fitting(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return self._fitting(-value)
        raise self._wrong(node)

    def _fitting(self, value: Any) -> Any:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(
                f"where={self.text!r}: {printable(value, 40)} is no whole number of 64 bits; write "
                f"it with a point or an exponent, such as 1e30"
            )
        return value

    def _wrong(self, node: ast.expr) -> ValueError:
        return ValueError(
            f"where={self.text!r}: {ast.unparse(node)!r} is not a comparison of columns, numbers "
            "and texts"
        )


def _expression(value: Any) -> pc.Expression:
    return value if isinstance(value, pc.Expression) else pc.scalar(value)
