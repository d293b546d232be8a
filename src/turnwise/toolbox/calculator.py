"""A calculator: arithmetic read as Python's syntax and worked out node by node, never run."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from turnwise.errors import ToolError
from turnwise.tools import Tool, tool

MAX_CHARS = 500
"""Longest expression."""
MAX_BITS = 4096
"""Largest whole number, about 1,233 digits."""
DIGITS = 12
"""Significant digits of a result that is not whole."""

_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_CONSTANTS: Mapping[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator_tool() -> Tool:
    """The tool `calculator(expression)`."""
    return tool(calculator, inline=True, result_cap=MAX_BITS)


def calculator(expression: str) -> str:
    """Value of an arithmetic expression, such as (3 + 4.5) * sqrt(2) or 2 ** 10.

    It knows + - * / // % ** (or ^), parentheses, pi, e, tau, and the functions abs, round, floor, ceil, min, max, sum,
    sqrt, exp, log, log2, log10, sin, cos, tan, asin, acos, atan, factorial, gcd, lcm, comb.

    Args:
        expression: numbers, operators and functions
    """
    return _written(value_of(expression))


def value_of(expression: str) -> int | float:
    """The number that an expression stands for. Raises ToolError, with the reason, where it stands for none."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression must have at most {MAX_CHARS} characters; it has {len(expression)}")
    text = expression.translate(_SPELLINGS).replace("^", "**").strip().removesuffix("=").strip()
    try:
        return _value(ast.parse(text, mode="eval").body)
    except ToolError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or "it is nested too deeply"
        raise ToolError(f"the expression must be arithmetic such as (3 + 4) * 2: {reason}") from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except OverflowError as error:
        raise _too_large() from error


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant):
        return _number(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _number(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _called(node.func.id, node.args)
    raise ToolError(f"the expression must hold numbers, operators and functions alone; got {ast.unparse(node)[:60]}")


def _called(name: str, arguments: list[ast.expr]) -> int | float:
    function = _FUNCTIONS.get(name)
    if function is None:
        raise ToolError(f"there is no function {name[:30]}; there are: {', '.join(_FUNCTIONS)}")
    values = [_value(argument) for argument in arguments]
    try:
        return _number(function(*values))
    except TypeError as error:
        raise ToolError(f"{name} cannot take {', '.join(map(str, values)) or 'no values'}") from error
    except ValueError as error:
        raise ToolError(f"{name} has no value at {', '.join(map(str, values))}") from error


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ToolError(f"every value must be a real number; got {str(value)[:60]}")
    if (isinstance(value, int) and value.bit_length() > MAX_BITS) or (isinstance(value, float) and math.isinf(value)):
        raise _too_large()
    return value


def _too_large() -> ToolError:
    return ToolError(f"the numbers must stay below 2 ** {MAX_BITS}, those with a fraction below 1.8e308")


def _product(left: Any, right: Any) -> Any:
    _check_bits(left, right, lambda a, b: a.bit_length() + b.bit_length())
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    _check_bits(base, exponent, lambda a, b: (a.bit_length() - 1) * b if a not in (-1, 0, 1) else 0)
    return base**exponent


def _check_bits(left: Any, right: Any, bits: Callable[[int, int], int]) -> None:
    """Raises ToolError before whole numbers would grow beyond the limit, by a bound from below or a few bits above."""
    if isinstance(left, int) and isinstance(right, int) and bits(left, right) > MAX_BITS + 1:
        raise _too_large()


def _factorial(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= 500:
        raise ToolError(f"factorial must have a whole number from 0 to 500; got {value}")
    return math.factorial(value)


def _comb(total: Any, chosen: Any) -> int:
    if not isinstance(total, int) or not isinstance(chosen, int) or not 0 <= total <= MAX_BITS:
        raise ToolError(f"comb must have whole numbers, the first from 0 to {MAX_BITS}; got {total} and {chosen}")
    return math.comb(total, chosen)


def _round(value: Any, digits: Any = 0) -> Any:
    if digits not in range(-20, 21):
        raise ToolError(f"round must have digits from -20 to 20; got {digits}")
    return round(value, digits) if digits else round(value)


def _sum(*values: int | float) -> int | float:
    return sum(values)


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _product,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "sum": _sum,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "factorial": _factorial,
    "gcd": math.gcd,
    "lcm": math.lcm,
    "comb": _comb,
}


def _written(value: int | float) -> str:
    """Whole numbers in full, others with `DIGITS` significant digits, so that 0.1 + 0.2 is 0.3."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.{DIGITS}g}"
    if isinstance(value, float) and abs(value) >= 1e15:
        return f"{value:.{DIGITS}g}"
    return str(int(value))
