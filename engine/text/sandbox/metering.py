"""Payments in the source: a parsed template is changed so that it pays for what it does, as it does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.exceptions import TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

from engine.text.sandbox.budget import CALL, NODE, TURN, budget_of

MAX_NODES = 20_000
"""Of a template's syntax tree; large ones in the field have 3,000. Compiling takes up to 12 kB and 80 us for each."""

_BODIES = ("body", "else_")
_PAY, _EACH, _WEIGHED, _SEARCHED, _KEPT, _JOIN = " pay", " each", " weighed", " searched", " kept", " join"
"""Filters under names that no template can write."""


def meter(source: nodes.Template, environment: Environment) -> None:
    """Put payments into a parsed template; `environment` has `PAYMENTS` among its filters.

    Raises TemplateSyntaxError for a template that is too large, and for what a chat template has no use for.
    """
    num_nodes = sum(1 for _ in source.find_all(nodes.Node))
    if num_nodes > MAX_NODES:
        raise TemplateSyntaxError(f"at most {MAX_NODES} pieces of syntax are compiled, it has {num_nodes}", 1)
    _Metering().visit(source)
    source.set_environment(environment)  # of the new nodes


class _Metering(NodeTransformer):
    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        for field in _BODIES:
            body = getattr(node, field, None)
            if isinstance(body, list) and body:
                work = NODE * sum(map(_num_nodes, body))
                payment = _metered(nodes.Const(None, lineno=node.lineno), _PAY, work)
                body.insert(0, nodes.ExprStmt(payment, lineno=node.lineno))
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        """Text of the template itself goes the way of all output, so that it is paid for."""
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        per_turn = TURN + (NODE * _num_nodes(node.test) if node.test is not None else 0)
        node.iter = _metered(node.iter, _EACH, per_turn)  # type: ignore[arg-type]  # an expression, whatever jinja2 says
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _metered(nodes.List(node.nodes, lineno=node.lineno), _JOIN)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _metered(node, _KEPT)
        node.arg = _weighed(node.arg)  # hashing takes time
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
        node.key = _weighed(node.key)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        only = node.ops[0] if len(node.ops) == 1 else None
        if only is not None and only.op in ("in", "notin"):
            if not isinstance(only.expr, nodes.Literal):
                only.expr = _metered(only.expr, _SEARCHED)
        elif only is not None and (isinstance(node.expr, nodes.Const) or isinstance(only.expr, nodes.Const)):
            return node  # never looks further than the constant goes, which paid for its length
        else:
            for operand in node.ops:
                operand.expr = _weighed(operand.expr)
        node.expr = _weighed(node.expr)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise TemplateSyntaxError("autoescape is not supported: a prompt is no HTML", node.lineno)

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        name = type(node).__name__.lower()
        raise TemplateSyntaxError(f"{name} is not supported: a chat template stands alone", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


def _metered(node: nodes.Expr, name: str, *args: int) -> nodes.Filter:
    constants = [nodes.Const(value, lineno=node.lineno) for value in args]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _metered(node, _WEIGHED)


def _num_nodes(node: nodes.Node) -> int:
    """Nodes that run with this one; bodies pay for themselves."""
    own = 1
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        own = 8  # a lookup takes several times as long
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        own += len(node.value) // NODE  # it may be searched or compared
    return own + sum(map(_num_nodes, node.iter_child_nodes(exclude=_BODIES)))


@pass_context
def finalize(context: Context, value: Any) -> str:
    """Every piece of output passes through here."""
    budget = budget_of(context)
    budget.spend(CALL)
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
def _weigh(context: Context, value: Any) -> Any:
    budget_of(context).weigh(value)
    return value


@pass_context
def _search(context: Context, value: Any) -> Any:
    budget_of(context).search(value)
    return value


@pass_context
def _keep(context: Context, value: Any) -> Any:
    return budget_of(context).keep(value)


@pass_context
def _join(context: Context, items: Sequence[Any]) -> str:
    """The operator ~."""
    budget = budget_of(context)
    shown = [budget.show(item) for item in items]
    budget.make(sum(map(len, shown)))
    return "".join(shown)


PAYMENTS = {_PAY: _pay, _EACH: _each, _WEIGHED: _weigh, _SEARCHED: _search, _KEPT: _keep, _JOIN: _join}
"""The filters that a metered template calls, by name."""
