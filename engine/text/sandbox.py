"""jinja2 for templates that nobody has read: what a rendering may cost is counted, and cut off.

jinja2's own sandbox keeps a template away from Python's internals. It does not keep it from running for ever or from
filling memory, and a chat template is part of a checkpoint that anybody may have published. Here every rendering has a
`Budget` of work (time) and of what it makes (memory), both proportional to what goes in. They are charged

* by the source: each body of statements (a loop's, a branch's, a macro's) begins by paying for its own nodes, and each
  turn of a loop is paid for;
* by operations: calls, filters, tests, operators, comparisons, slices and every piece of output, by the size of what
  they read and make. What could make much of little (`*`, `join`, `center`, `"%9d"`) is estimated before it is done.

Only listed functions, methods of strings, lists and dicts, and filters can be called at all: one that is not listed
has not been looked at. Budgets are counted, not timed, so a template renders everywhere or nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK = 50_000_000
"""Units of 10 to 20 ns that every rendering has: up to a second."""
WORK_PER_CHARACTER = 100
MAX_MADE = 16 << 20
"""Characters that every rendering may make, on the way to its output and as such; an item of a list counts as 16."""
MADE_PER_CHARACTER = 16
MAX_NODES = 20_000
"""Of a template's syntax tree; large ones in the field have 3,000. Compiling takes up to 12 kB and 80 us for each."""
MAX_NESTED = 100
"""Depth of lists and dicts: beyond a few thousand, Python's own recursion in C would be at risk."""
MAX_WIDTH = 10_000
"""Of padding and indentation, and of numbers that are printed."""
MAX_INT_BITS = 1 << 16

BUDGET = "budget of this rendering"
"""The variable that holds it. No template can write this name."""

_NODE, _CALL, _TURN, _LOOK = 8, 200, 40, 30  # work
_ITEM = 16  # characters, and work


class Budget:
    """What one rendering may still spend. `num_characters` is the size of what it is given."""

    def __init__(self, num_characters: int, max_work: int = MAX_WORK) -> None:
        self._work = max_work + WORK_PER_CHARACTER * num_characters
        self._made = MAX_MADE + MADE_PER_CHARACTER * num_characters

    def spend(self, work: int) -> None:
        """Raises SecurityError where no more is left."""
        self._work -= work
        if self._work < 0:
            raise SecurityError("it takes too many steps")

    def make(self, size: int) -> None:
        """Pay for characters that were or will be made."""
        self._made -= size
        if self._made < 0:
            raise SecurityError("it makes too much text")
        self.spend(size)

    def need_room(self, size: int) -> None:
        """Raise SecurityError where something of `size` characters could not be paid for; nothing is paid yet."""
        if size > self._made:
            raise SecurityError("it makes too much text")

    def weigh(self, value: object) -> int:
        """Pay for looking at all of a value, as printing or comparing it does; how many characters that is.

        Lists may be contained in one another many times, which makes their text grow exponentially: each time is paid.
        """
        if isinstance(value, str):
            self.spend(len(value))
            return len(value)
        total, left = 0, [(value, 0)]
        while left:
            one, depth = left.pop()
            if depth > MAX_NESTED:
                raise SecurityError(f"its data are nested deeper than {MAX_NESTED}")
            if isinstance(one, str):
                size = len(one)
            elif isinstance(one, Mapping):
                size = 2 * _ITEM * len(one)
                self.spend(size)  # before this list grows
                left += [(part, depth + 1) for pair in one.items() for part in pair]
            elif isinstance(one, list | tuple | KeysView | ValuesView | ItemsView):
                size = _ITEM * len(one)
                self.spend(size)
                left += [(item, depth + 1) for item in one]
            elif isinstance(one, range):
                size = len(one)
            else:
                size = _ITEM + (one.bit_length() // 3 if isinstance(one, int) else 0)
            total += size
            self.spend(size + _LOOK)
        return total

    def search(self, haystack: object) -> None:
        """Pay for `in`."""
        if not isinstance(haystack, Mapping):
            self.weigh(haystack)

    def keep(self, made: Any) -> Any:
        """Pay for a result; what comes lazily pays item by item."""
        if isinstance(made, str):
            self.make(len(made))
        elif isinstance(made, list | tuple):
            self.make(_ITEM * (1 + len(made)))
        elif isinstance(made, dict):
            self.make(4 * _ITEM * (1 + len(made)))
        elif isinstance(made, Iterator):
            return self.each(made)
        return made

    def each(self, items: Iterable[Any], work: int = _TURN) -> Iterator[Any]:
        """The items, each paid for as it is taken."""
        for item in items:
            self.spend(work)
            yield item

    def collect(self, items: Iterable[Any]) -> Any:
        """What is consumed anyway, as a list, so that it can be weighed."""
        return list(self.each(items, _TURN + _ITEM)) if isinstance(items, Iterator) else items

    def show(self, value: object) -> str:
        """str(value), paid for."""
        if isinstance(value, str):
            return value
        self.need_room(self.weigh(value))
        return str(value)


def budget_of(context: Context) -> Budget:
    """The budget of the rendering that `context` belongs to."""
    budget = context.parent[BUDGET]
    assert isinstance(budget, Budget)
    return budget


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with budgets. Renderings need a `Budget` in the variable `BUDGET`.

    `functions` are called from templates by name (they may be `pass_context`), `filters` are added to jinja2's or
    replace them; both look after what they cost themselves, beyond the size of their arguments.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(
        self,
        *,
        functions: Mapping[str, Callable[..., Any]],
        filters: Mapping[str, Callable[..., Any]],
        extensions: Sequence[type[Extension]],
    ) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_finalize)
        # Filters and tests as they are; what templates reach are their metered counterparts.
        self._plain = ImmutableSandboxedEnvironment()
        self._plain.filters.update(filters)
        self.filters = {name: self._metered_filter(name) for name in (*_SHALLOW_FILTERS, *_DEEP_FILTERS, *filters)}
        self.filters |= {_PAY: _pay, _EACH: _each, _WEIGHED: _weighed, _SEARCHED: _searched, _KEPT: _kept, _JOIN: _join}
        self.tests = {name: self._metered_test(name) for name in self._plain.tests}
        self.globals = {"range": safe_range, "dict": dict, "cycler": Cycler, "joiner": Joiner, "namespace": _Namespace}
        self.globals |= functions
        self._functions = tuple(self.globals.values())

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        """jinja2's hook between parsing and writing Python."""
        num_nodes = sum(1 for _ in source.find_all(nodes.Node))
        if num_nodes > MAX_NODES:
            raise TemplateSyntaxError(f"at most {MAX_NODES} pieces of syntax are compiled, it has {num_nodes}", 1)
        _Metering().visit(source)
        source.set_environment(self)
        return super()._generate(source, name, filename, defer_init)

    def _metered_filter(self, name: str) -> Callable[..., Any]:
        @pass_context
        def filtered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget = budget_of(context)
            budget.spend(_CALL)
            if name not in _SHALLOW_FILTERS:
                value = budget.collect(value)
                if name == "indent":
                    value = budget.show(value)  # jinja2's `s += ...` would write into a list
                weight = sum(budget.weigh(part) for part in (value, *args, *kwargs.values()))
                budget.need_room(weight)  # many make text of what they are given
                if name in _SORTING_FILTERS:
                    budget.spend(weight * len(value).bit_length() if hasattr(value, "__len__") else weight)
                elif name == "title":
                    budget.spend(15 * weight)  # word by word in Python
                _estimate_filter(budget, name, value, weight, args, kwargs)
            elif name in _LAZY_FILTERS and value:
                value = budget.each(value, _CALL)  # also what is left out is paid for
                if name in ("batch", "slice"):
                    budget.need_room(_ITEM * _largest(args, kwargs))
            elif name == "list" and hasattr(value, "__len__"):
                budget.need_room(_ITEM * len(value))
            return budget.keep(self._plain.call_filter(name, value, args, kwargs, context=context))

        return filtered

    def _metered_test(self, name: str) -> Callable[..., Any]:
        @pass_context
        def tested(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget = budget_of(context)
            budget.spend(_CALL)
            if name == "in":
                budget.weigh(value)
                for haystack in args:
                    budget.search(haystack)
            elif name in _DEEP_TESTS:
                for part in (value, *args):
                    budget.weigh(part)
            return self._plain.call_test(name, value, args, kwargs, context=context)

        return tested

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = budget_of(context)
        budget.spend(_CALL)
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
                budget.need_room((1 if isinstance(many, str) else _ITEM) * len(many) * max(count, 0))
        elif operator == "+":
            if hasattr(left, "__len__") and hasattr(right, "__len__"):
                budget.need_room(len(left) + len(right))
        elif not all(isinstance(operand, int | float | Undefined) for operand in (left, right)):
            raise SecurityError(f"{operator!r} works on numbers only")
        return budget.keep(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format at the moment it is looked up; `call` carries it out."""
        is_method = isinstance(value, BuiltinMethodType | MethodType) and isinstance(value.__self__, str)
        return _Format(value.__self__) if is_method and value.__name__ == "format" else None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(__context)
        budget.spend(_CALL + _NODE * (len(args) + len(kwargs)))
        owner = getattr(__obj, "__self__", None) if isinstance(__obj, BuiltinMethodType | MethodType) else None
        if isinstance(__obj, _Format):
            return budget.keep(_Formatter(__self, budget).vformat(__obj.form, args, kwargs))
        if isinstance(__obj, BuiltinMethodType) and owner is not None:
            args = _pay_method(budget, owner, __obj.__name__, args, kwargs)
        elif isinstance(__obj, LoopContext):  # a recursive loop goes on with other items
            args = (budget.each(args[0]), *args[1:]) if args else args
        elif any(__obj is function for function in _LAZY):
            budget.spend(_ITEM * sum(len(part) for part in args if hasattr(part, "__len__")))
        elif isinstance(owner, LoopContext | Cycler) or any(__obj is function for function in __self._functions):
            for part in (*args, *kwargs.values()):
                budget.weigh(part)
        elif not isinstance(__obj, Macro | BlockReference | Joiner | Undefined) and not isinstance(owner, Extension):
            raise SecurityError(f"{_named(__obj)} cannot be called")
        return budget.keep(super().call(__context, __obj, *args, **kwargs))


def _named(thing: object) -> str:
    name = getattr(thing, "__name__", None)
    return f"{name!r}" if isinstance(name, str) else f"a value of type {type(thing).__name__!r}"


class _Namespace(Namespace):
    """Printed without what it holds: a namespace may hold itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


_LAZY = (dict, Cycler, Joiner, _Namespace, safe_range)
"""Functions that keep or count what they are given without looking into it."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters

_SHALLOW_FILTERS = _words(
    "abs attr batch count d default first items last length list map reject rejectattr reverse select selectattr slice"
)
"""What does not look into the items it is given, or comes lazily."""
_DEEP_FILTERS = _words(
    "capitalize center dictsort e escape float forceescape format groupby indent int join lower max min replace "
    "round safe sort string sum title tojson trim truncate unique upper"
)
_LAZY_FILTERS = _words("batch map reject rejectattr select selectattr slice")
_SORTING_FILTERS = frozenset({"dictsort", "groupby", "sort"})


def _largest(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return max((abs(part) for part in (*args, *kwargs.values()) if isinstance(part, int)), default=0)


def _estimate_filter(
    budget: Budget, name: str, value: Any, weight: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise SecurityError for what would make far more than the `weight` of its arguments."""
    extra = max((len(part) for part in (*args, *kwargs.values()) if isinstance(part, str)), default=0)
    if name in ("center", "indent", "round", "tojson", "truncate") and _largest(args, kwargs) > MAX_WIDTH:
        raise SecurityError(f"{name}: at most {MAX_WIDTH} is supported, not {_largest(args, kwargs)}")
    if name == "round":
        _need_digits(_largest(args, kwargs))
    elif name == "tojson":
        extra = max([extra, *(len(part) for pair in kwargs.values() if isinstance(pair, tuple) for part in pair)])
        indent = kwargs.get("indent")
        width = len(indent) if isinstance(indent, str) else _largest(args, kwargs)
        budget.need_room(weight // _ITEM * (extra + width * _depth(value)))
    elif name == "indent":
        budget.need_room((len(_lines(value)) if isinstance(value, str) else 1) * (extra + _largest(args, kwargs)))
    elif name == "join" and hasattr(value, "__len__"):
        budget.need_room(weight + len(value) * extra)
    elif name == "replace" and isinstance(value, str) and len(args) > 1:
        _estimate_replace(budget, value, args)
    elif name == "format":
        _estimate_printf(budget, budget.show(value), weight)
    elif name == "sum" and not all(isinstance(part, int | float | str) for part in (*args, *kwargs.values())):
        raise SecurityError("sum: only numbers can be added up")


def _need_digits(count: int) -> None:
    if count > 300:
        raise SecurityError(f"round: at most 300 digits are supported, not {count}")


def _depth(value: object) -> int:
    """Of data that were weighed, so it ends."""
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _estimate_replace(budget: Budget, text: str, args: Sequence[Any]) -> None:
    old, new = args[0], args[1]
    if isinstance(old, str) and isinstance(new, str):
        budget.need_room(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


_PRINTF = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


def _estimate_printf(budget: Budget, form: str, weight: int) -> None:
    """`form % data`, where data weigh `weight`: every % may print all of them."""
    budget.spend(_CALL * form.count("%"))
    widths = [width for match in _PRINTF.finditer(form) for width in match.groups() if width]
    if any(width == "*" or len(width) > 5 or int(width) > MAX_WIDTH for width in widths):
        raise SecurityError(f"a width in {form[:50]!r} is more than {MAX_WIDTH}")
    budget.need_room(len(form) + sum(map(int, widths)) + form.count("%") * weight)


# Tests

_DEEP_TESTS = _words("== != < > <= >= eq equalto ne lt lessthan le gt greaterthan ge lower upper divisibleby")


# Methods

_CHEAP_METHODS = _words("startswith endswith removeprefix removesuffix")
_TEXT_METHODS = _words(
    "capitalize casefold center count find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition replace rfind rindex rjust "
    "rpartition rsplit rstrip split splitlines strip swapcase title upper zfill"
)
_LIST_METHODS = frozenset({"copy", "count", "index"})
_DICT_METHODS = _words("copy get items keys values")


def _pay_method(
    budget: Budget, owner: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Pay for a method of a string, list or dict; the arguments that it is called with."""
    if isinstance(owner, str) and name in (_TEXT_METHODS | _CHEAP_METHODS):
        args = tuple(budget.collect(part) for part in args)
        weight = sum(budget.weigh(part) for part in (*args, *kwargs.values()))
        if name in _TEXT_METHODS:
            # Searching from the end, or stripping a set of characters, compares each with each.
            budget.spend(len(owner) + len(owner) * weight // 16)
        _estimate_method(budget, owner, name, args, weight, kwargs)
    elif isinstance(owner, list | tuple) and name in _LIST_METHODS:
        for part in (owner, *args):
            budget.weigh(part)
    elif isinstance(owner, dict) and name in _DICT_METHODS:
        for key in args[:1]:
            budget.weigh(key)
        budget.spend(len(owner) * _ITEM if name == "copy" else 0)
    else:
        raise SecurityError(f"method {name!r} of a value of type {type(owner).__name__!r} cannot be called")
    return args


def _estimate_method(
    budget: Budget, text: str, name: str, args: Sequence[Any], weight: int, kwargs: Mapping[str, Any]
) -> None:
    if name in ("center", "ljust", "rjust", "zfill") and _largest(args, {}) > MAX_WIDTH:
        raise SecurityError(f"{name}: at most {MAX_WIDTH} is supported, not {_largest(args, {})}")
    if name == "join" and args and hasattr(args[0], "__len__"):
        budget.need_room(weight + len(args[0]) * len(text))
    elif name == "replace" and len(args) > 1:
        _estimate_replace(budget, text, args)
    elif name == "splitlines":
        budget.need_room(_ITEM * len(_lines(text)))
    elif name in ("split", "rsplit"):
        sep = args[0] if args else kwargs.get("sep")
        at_most = args[1] if len(args) > 1 else kwargs.get("maxsplit", -1)
        parts = 1 + (text.count(sep) if isinstance(sep, str) and sep else len(text) // 2)
        budget.need_room(_ITEM * (min(parts, at_most + 1) if isinstance(at_most, int) and at_most >= 0 else parts))


_LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def _lines(text: str) -> range:
    """As many items as `text` has lines, at least."""
    return range(1 + sum(1 for _ in _LINE_ENDS.finditer(text)))


class _Format:
    """A string's `format` method."""

    def __init__(self, form: str) -> None:
        self.form = form

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        raise SecurityError("'format' can only be called by the template itself")


class _Formatter(SandboxedFormatter):
    """str.format, each field paid for."""

    def __init__(self, environment: Sandbox, budget: Budget) -> None:
        super().__init__(environment)
        self._budget = budget

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        self._budget.spend(_CALL + _CALL // 2 * len(field_name))  # two characters can be an attribute
        return super().get_field(field_name, args, kwargs)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            self._budget.need_room(self._budget.weigh(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        if any(len(width) > 5 or int(width) > MAX_WIDTH for width in re.findall(r"\d+", format_spec)):
            raise SecurityError(f"a width in {format_spec[:50]!r} is more than {MAX_WIDTH}")
        self._budget.spend(_CALL)
        self._budget.need_room(self._budget.weigh(value))
        made = str(super().format_field(value, format_spec))
        self._budget.make(len(made))
        return made


# What the source is changed into. These filters have names that no template can write.

_PAY, _EACH, _WEIGHED, _SEARCHED, _KEPT, _JOIN = " pay", " each", " weighed", " searched", " kept", " join"


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Every piece of output passes through here."""
    budget = budget_of(context)
    budget.spend(_CALL)
    shown = budget.show(value)
    budget.make(len(shown))
    return shown


@pass_context
def _pay(context: Context, value: Any, work: int) -> Any:
    budget_of(context).spend(work)
    return value


@pass_context
def _each(context: Context, value: Any, work: int) -> Any:
    return budget_of(context).each(value, work)


@pass_context
def _weighed(context: Context, value: Any) -> Any:
    budget_of(context).weigh(value)
    return value


@pass_context
def _searched(context: Context, value: Any) -> Any:
    budget_of(context).search(value)
    return value


@pass_context
def _kept(context: Context, value: Any) -> Any:
    return budget_of(context).keep(value)


@pass_context
def _join(context: Context, items: Sequence[Any]) -> str:
    """The operator ~."""
    budget = budget_of(context)
    shown = [budget.show(item) for item in items]
    budget.make(sum(map(len, shown)))
    return markup_join(shown) if context.eval_ctx.autoescape else str_join(shown)


class _Metering(NodeTransformer):
    """Puts payments into a parsed template."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        for field in _BODIES:
            body = getattr(node, field, None)
            if isinstance(body, list) and body:
                work = _NODE * sum(map(_num_nodes, body))
                payment = _metered(nodes.Const(None, lineno=node.lineno), _PAY, work)
                body.insert(0, nodes.ExprStmt(payment, lineno=node.lineno))
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        """Text of the template itself goes the way of all output, so that it is paid for."""
        return nodes.MarkSafeIfAutoescape(nodes.Const(node.data, lineno=node.lineno), lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        per_turn = _TURN + (_NODE * _num_nodes(node.test) if node.test is not None else 0)
        node.iter = _metered(node.iter, _EACH, per_turn)  # type: ignore[arg-type]  # an expression, whatever jinja2 says
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _metered(nodes.List(node.nodes, lineno=node.lineno), _JOIN)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _metered(node, _KEPT)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _metered(node.arg, _WEIGHED)  # hashing takes time
        return node

    def visit_List(self, node: nodes.List | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if len(node.items) <= 16 and all(isinstance(item, nodes.Const) for item in node.items):
            return node  # as in `role in ['user', 'assistant']`: the nodes' price is enough
        return _metered(node, _KEPT)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node, _KEPT)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _metered(node.key, _WEIGHED)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1:
            (operand,) = node.ops
            if operand.op in ("in", "notin"):
                if not isinstance(operand.expr, nodes.Literal):
                    operand.expr = _metered(operand.expr, _SEARCHED)
            elif isinstance(node.expr, nodes.Const) or isinstance(operand.expr, nodes.Const):
                return node  # never more than the constant's length
            else:
                operand.expr = _metered(operand.expr, _WEIGHED)
        else:
            for operand in node.ops:
                operand.expr = _metered(operand.expr, _WEIGHED)
        if not isinstance(node.expr, nodes.Const):
            node.expr = _metered(node.expr, _WEIGHED)
        return node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        name = type(node).__name__.lower()
        raise TemplateSyntaxError(f"{name} is not supported: a chat template stands alone", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


_BODIES = ("body", "else_")


def _metered(node: nodes.Expr, name: str, *args: int) -> nodes.Filter:
    constants = [nodes.Const(value, lineno=node.lineno) for value in args]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _num_nodes(node: nodes.Node) -> int:
    """Nodes that run with this one; bodies pay for themselves."""
    own = 8 if isinstance(node, nodes.Getattr | nodes.Getitem) else 1  # a lookup takes several times as long
    return own + sum(map(_num_nodes, node.iter_child_nodes(exclude=_BODIES)))
