"""What filters, tests, operators and methods cost: paid by what they read, estimated by what they would make.

What is not listed here has not been looked at, and no template reaches it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

from engine.text.sandbox.budget import CALL, ITEM, TURN, Budget

MAX_WIDTH = 10_000
"""Of padding and indentation, and of numbers that are printed."""
MAX_DIGITS = 300
"""That a number is rounded to."""
MAX_INT_BITS = 1 << 16

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters

_LAZY_FILTERS = _words("batch map reject rejectattr select selectattr slice")
"""What takes item by item, and only as far as it is asked to."""
_SHALLOW_FILTERS = _words("abs attr count d default first items last length list reverse")
"""What does not look into the items that it is given."""
_DEEP_FILTERS = _words(
    "capitalize center dictsort e escape float forceescape format groupby indent int join lower max min replace "
    "round safe sort string sum title tojson trim truncate unique upper"
)
FILTERS = _LAZY_FILTERS | _SHALLOW_FILTERS | _DEEP_FILTERS

_ITEM_FILTERS = _words("groupby join max min sort sum unique")
"""Those of the deep ones that take item by item, and may look up an attribute of each, as "a.b.c"."""
_SORTING_FILTERS = frozenset({"dictsort", "groupby", "sort"})
_WIDE_FILTERS = frozenset({"center", "indent", "tojson", "truncate"})


def pay_filter(budget: Budget, name: str, value: Any, args: Args, kwargs: Kwargs) -> Any:
    """Pay for a filter, listed above or not; the value that it is to be applied to."""
    budget.spend(CALL)
    if name in _LAZY_FILTERS:
        if name in ("batch", "slice"):
            budget.need_room(ITEM * _largest(args, kwargs))
        return budget.each(value, CALL * _num_lookups(args, kwargs)) if value else value  # also for what is left out
    if name in _SHALLOW_FILTERS:
        if name == "list" and hasattr(value, "__len__"):
            budget.need_room(ITEM * len(value))
        return value
    value = budget.collect(value)
    if name in ("indent", "replace"):
        value = budget.show(value)  # they would make text of it themselves, or write into a list
    weight = sum(budget.weigh(part) for part in (value, *args, *kwargs.values()))
    budget.need_room(weight)  # many make text of what they are given
    num_items = len(value) if hasattr(value, "__len__") else 1
    if name in _SORTING_FILTERS:
        budget.spend(weight * num_items.bit_length())
    if name in _ITEM_FILTERS:
        budget.spend(num_items * (TURN + CALL * (_num_lookups(args, kwargs) - 1)))
    _estimate_filter(budget, name, value, weight, args, kwargs)
    return value


def _estimate_filter(budget: Budget, name: str, value: Any, weight: int, args: Args, kwargs: Kwargs) -> None:
    """Raise SecurityError for what would make far more, or take far longer, than the `weight` of its arguments."""
    extra = max((len(part) for part in (*args, *kwargs.values()) if isinstance(part, str)), default=0)
    if name in _WIDE_FILTERS:
        _need_width(name, _largest(args, kwargs))
    match name:
        case "round":
            _need_width(name, _largest(args, kwargs), MAX_DIGITS)
        case "tojson":
            extra = max([extra, *(len(part) for pair in kwargs.values() if isinstance(pair, tuple) for part in pair)])
            indent = kwargs.get("indent")
            width = len(indent) if isinstance(indent, str) else _largest(args, kwargs)
            budget.need_room(weight // ITEM * (extra + width * _depth(value)))
        case "indent":
            budget.need_room(_num_lines(value) * (extra + _largest(args, kwargs)))
        case "join" if hasattr(value, "__len__"):
            budget.need_room(weight + len(value) * extra)
        case "replace":
            old, new = _argument(args, kwargs, 0, "old", ""), _argument(args, kwargs, 1, "new", "")
            _estimate_replace(budget, value, budget.show(old), budget.show(new))
        case "trim":
            _pay_strip(budget, value, weight)
        case "title":
            budget.spend(15 * weight)  # word by word in Python
        case "format":
            _estimate_printf(budget, budget.show(value), weight)
        case "sum" if not all(isinstance(part, int | float | str) for part in (*args, *kwargs.values())):
            raise SecurityError("sum: only numbers can be added up")


# Tests

_COMPARING_TESTS = _words("== != < > <= >= eq equalto ne lt lessthan le gt greaterthan ge lower upper divisibleby")


def pay_test(budget: Budget, name: str, value: Any, args: Args, kwargs: Kwargs) -> None:
    budget.spend(CALL)
    if name == "in":
        budget.weigh(value)
        for haystack in (*args, *kwargs.values()):
            budget.search(haystack)
    elif name in _COMPARING_TESTS:
        for part in (value, *args, *kwargs.values()):
            budget.weigh(part)


# Operators


def pay_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Pay for one of + - * / // ** %, as far as its result does not tell."""
    budget.spend(CALL)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if bits > MAX_INT_BITS or (operator == "**" and left.bit_length() * abs(right) > MAX_INT_BITS):
            raise SecurityError(f"the result of {operator!r} would be too large")
        budget.spend(bits)
    elif operator == "%" and isinstance(left, str):
        _estimate_printf(budget, left, budget.weigh(right))
    elif operator == "*":
        many, count = (left, right) if hasattr(left, "__len__") else (right, left)
        if hasattr(many, "__len__") and isinstance(count, int):
            budget.need_room((1 if isinstance(many, str) else ITEM) * len(many) * max(count, 0))
    elif operator == "+":
        if hasattr(left, "__len__") and hasattr(right, "__len__"):
            budget.need_room(len(left) + len(right))
    elif not all(isinstance(operand, int | float | Undefined) for operand in (left, right)):
        raise SecurityError(f"{operator!r} works on numbers only")


# Methods

_CHEAP_METHODS = _words("startswith endswith removeprefix removesuffix")
_TEXT_METHODS = _words(
    "capitalize casefold center count find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition replace rfind rindex rjust "
    "rpartition rsplit rstrip split splitlines strip swapcase title upper zfill"
)
_LIST_METHODS = frozenset({"copy", "count", "index"})
_DICT_METHODS = _words("copy get items keys values")


def pay_method(budget: Budget, owner: object, name: str, args: Args, kwargs: Kwargs) -> Args:
    """Pay for a method of a string, list or dict; the arguments that it is to be called with."""
    if isinstance(owner, str) and (name in _TEXT_METHODS or name in _CHEAP_METHODS):
        args = tuple(budget.collect(part) for part in args)
        weight = sum(budget.weigh(part) for part in (*args, *kwargs.values()))
        if name in _TEXT_METHODS:
            _pay_strip(budget, owner, weight)  # or searching from the end, which is no better
        _estimate_method(budget, owner, name, args, weight, kwargs)
    elif isinstance(owner, list | tuple) and name in _LIST_METHODS:
        for part in (owner, *args):
            budget.weigh(part)
    elif isinstance(owner, dict) and name in _DICT_METHODS:
        for key in args[:1]:
            budget.weigh(key)
        budget.spend(len(owner) * ITEM if name == "copy" else 0)
    else:
        raise SecurityError(f"method {name!r} of a value of type {type(owner).__name__!r} cannot be called")
    return args


def _estimate_method(budget: Budget, text: str, name: str, args: Args, weight: int, kwargs: Kwargs) -> None:
    match name:
        case "center" | "ljust" | "rjust" | "zfill":
            _need_width(name, _largest(args, kwargs))
        case "join" if args and hasattr(args[0], "__len__"):
            budget.need_room(weight + len(args[0]) * len(text))
        case "replace" if len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            _estimate_replace(budget, text, args[0], args[1])
        case "splitlines":
            budget.need_room(ITEM * _num_lines(text))
        case "split" | "rsplit":
            sep, at_most = _argument(args, kwargs, 0, "sep", None), _argument(args, kwargs, 1, "maxsplit", -1)
            parts = 1 + (text.count(sep) if isinstance(sep, str) and sep else len(text) // 2)
            budget.need_room(ITEM * (min(parts, at_most + 1) if isinstance(at_most, int) and at_most >= 0 else parts))


# What several of them do


def _argument(args: Args, kwargs: Kwargs, place: int, name: str, default: Any) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


def _largest(args: Args, kwargs: Kwargs) -> int:
    return max((abs(part) for part in (*args, *kwargs.values()) if isinstance(part, int)), default=0)


def _num_lookups(args: Args, kwargs: Kwargs) -> int:
    """Of each item, at most: "a.b,c" are three."""
    texts = [part for part in (*args, *kwargs.values()) if isinstance(part, str)]
    return 1 + max((text.count(".") + text.count(",") for text in texts), default=0)


def _need_width(name: str, width: int, limit: int = MAX_WIDTH) -> None:
    if width > limit:
        raise SecurityError(f"{name}: at most {limit} is supported, not {width}")


def _depth(value: object) -> int:
    """Of data that were weighed, so it ends."""
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _pay_strip(budget: Budget, text: object, weight: int) -> None:
    """Stripping a set of characters that weigh `weight` compares each with each."""
    if isinstance(text, str):
        budget.spend(len(text) + len(text) * weight // 16)


def _estimate_replace(budget: Budget, text: str, old: str, new: str) -> None:
    budget.need_room(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


_PRINTF = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


def _estimate_printf(budget: Budget, form: str, weight: int) -> None:
    """`form % data`, where data weigh `weight`: every % may print all of them."""
    budget.spend(CALL * form.count("%"))
    widths = [width for match in _PRINTF.finditer(form) for width in match.groups() if width]
    if any(width == "*" or len(width) > 5 or int(width) > MAX_WIDTH for width in widths):
        raise SecurityError(f"a width in {form[:50]!r} is more than {MAX_WIDTH}")
    budget.need_room(len(form) + sum(map(int, widths)) + form.count("%") * weight)


_LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def _num_lines(text: str) -> int:
    """At least as many as there are."""
    return 1 + sum(1 for _ in _LINE_ENDS.finditer(text))


def check_format_spec(spec: str) -> None:
    """Raise SecurityError for a field of str.format that would be too wide."""
    if any(len(width) > 5 or int(width) > MAX_WIDTH for width in re.findall(r"\d+", spec)):
        raise SecurityError(f"a width in {spec[:50]!r} is more than {MAX_WIDTH}")
