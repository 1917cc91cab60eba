"""The environment that templates are compiled and rendered in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

from engine.text.sandbox.budget import CALL, ITEM, NODE, Budget, budget_of
from engine.text.sandbox.costs import FILTERS, check_format_spec, pay_filter, pay_method, pay_operator, pay_test
from engine.text.sandbox.metering import PAYMENTS, finalize, meter


class _Namespace(Namespace):
    """Printed without what it holds: a namespace may hold itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


_FUNCTIONS = {"range": safe_range, "dict": dict, "cycler": Cycler, "joiner": Joiner, "namespace": _Namespace}
"""jinja2's own; they keep or count what they are given without looking into it."""


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
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=finalize)
        # Filters and tests as they are; what templates reach are their metered counterparts.
        self._plain = ImmutableSandboxedEnvironment()
        self._plain.filters.update(filters)
        self.filters = {name: self._metered_filter(name) for name in FILTERS | filters.keys()} | PAYMENTS
        self.tests = {name: self._metered_test(name) for name in self._plain.tests}
        self.globals = {**_FUNCTIONS, **functions}
        self._functions = tuple(functions.values())

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        """jinja2's hook between parsing and writing Python."""
        meter(source, self)
        return super()._generate(source, name, filename, defer_init)

    def _metered_filter(self, name: str) -> Callable[..., Any]:
        @pass_context
        def filtered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget = budget_of(context)
            value = pay_filter(budget, name, value, args, kwargs)
            return budget.keep(self._plain.call_filter(name, value, args, kwargs, context=context))

        return filtered

    def _metered_test(self, name: str) -> Callable[..., Any]:
        @pass_context
        def tested(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            pay_test(budget_of(context), name, value, args, kwargs)
            return self._plain.call_test(name, value, args, kwargs, context=context)

        return tested

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = budget_of(context)
        pay_operator(budget, operator, left, right)
        return budget.keep(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format at the moment it is looked up."""
        is_method = isinstance(value, BuiltinMethodType | MethodType) and isinstance(value.__self__, str)
        return _Format(self, value.__self__) if is_method and value.__name__ == "format" else None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(__context)
        budget.spend(CALL + NODE * (len(args) + len(kwargs)))
        owner = __obj.__self__ if isinstance(__obj, BuiltinMethodType | MethodType) else None
        if isinstance(__obj, BuiltinMethodType):
            args = pay_method(budget, owner, __obj.__name__, args, kwargs)
        elif isinstance(__obj, LoopContext):  # a recursive loop goes on with other items
            args = (budget.each(args[0]), *args[1:]) if args else args
        elif any(__obj is function for function in _FUNCTIONS.values()):
            budget.spend(ITEM * sum(len(part) for part in args if hasattr(part, "__len__")))
        elif isinstance(owner, LoopContext | Cycler) or any(__obj is function for function in __self._functions):
            for part in (*args, *kwargs.values()):
                budget.weigh(part)
        elif not (
            isinstance(__obj, _Format | Macro | BlockReference | Joiner | Undefined) or isinstance(owner, Extension)
        ):
            raise SecurityError(f"{_named(__obj)} cannot be called")
        return budget.keep(super().call(__context, __obj, *args, **kwargs))


class _Format:
    """A string's `format` method. Its fields are paid for one by one."""

    def __init__(self, environment: Sandbox, form: str) -> None:
        self._environment = environment
        self._form = form

    @pass_context
    def __call__(self, context: Context, *args: Any, **kwargs: Any) -> str:
        return _Formatter(self._environment, budget_of(context)).vformat(self._form, args, kwargs)


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: Sandbox, budget: Budget) -> None:
        super().__init__(environment)
        self._budget = budget

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        self._budget.spend(CALL + CALL // 2 * len(field_name))  # two characters can be an attribute
        return super().get_field(field_name, args, kwargs)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            self._budget.need_room(self._budget.weigh(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        check_format_spec(format_spec)
        self._budget.spend(CALL)
        self._budget.need_room(self._budget.weigh(value))
        made = str(super().format_field(value, format_spec))
        self._budget.make(len(made))
        return made


def _named(thing: object) -> str:
    name = getattr(thing, "__name__", None)
    return f"{name!r}" if isinstance(name, str) else f"a value of type {type(thing).__name__!r}"
