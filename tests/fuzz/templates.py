"""Jinja2 templates at random: from a grammar, so that most of them compile and do something.

Three variables of a template hold strings, lists and numbers that earlier statements made, so that operations are
applied to each other's results. Hostile sizes are as likely as small ones.
"""

from __future__ import annotations

from hypothesis import strategies as st

_VARIABLES = ("a", "b", "ns.x", "messages", "messages[0].content", "messages[-1]", "tools", "missing", "loop.index")
_NUMBERS = ("0", "1", "2", "-1", "7", "64", "1000", "100000", "1000000000", "-1000000000", "9999999999999999", "0.5")
_STRINGS = (
    "''",
    "'a'",
    "'ab\\n'",
    "'%s'",
    "'%1000000000d'",
    "'{0}'",
    "'{:>99999}'",
    "'<|im_end|>'",
    "'\\u0130\\U0001f600'",
)
_INTERNALS = ("__class__", "__init__", "__globals__", "_x", "gi_frame", "mro", "format", "format_map", "func_globals")
_FILTERS = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "default",
    "dictsort",
    "e",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
]
_TESTS = [
    "defined",
    "none",
    "string",
    "number",
    "mapping",
    "iterable",
    "sequence",
    "callable",
    "true",
    "even",
    "odd",
    "lower",
    "upper",
    "in",
    "eq",
    "lt",
    "sameas",
]
_METHODS = [
    "upper",
    "lower",
    "strip",
    "lstrip",
    "rstrip",
    "split",
    "rsplit",
    "splitlines",
    "startswith",
    "endswith",
    "replace",
    "join",
    "format",
    "find",
    "rfind",
    "count",
    "index",
    "center",
    "ljust",
    "zfill",
    "title",
    "expandtabs",
    "encode",
    "translate",
    "get",
    "items",
    "keys",
    "values",
    "copy",
    "append",
    "pop",
    "update",
    "removeprefix",
    "partition",
    "to_bytes",
    "fromkeys",
]
_OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", "in", "and", "or"]
_NAMES = (
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
    "raise_exception",
    "strftime_now",
    "m",
    "self",
    "lipsum",
    "loop",
)

_KEYWORDS = ("attribute", "default", "old", "new", "seq", "other", "start", "width", "length", "indent", "d", "chars")

_atoms = st.one_of(*(st.sampled_from(choices) for choices in (_VARIABLES, _NUMBERS, _STRINGS)))


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arguments = st.lists(inner, max_size=3).map(", ".join)
    attributes = st.sampled_from(_INTERNALS + _VARIABLES[:2]) | st.sampled_from(_METHODS)
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(_OPERATORS), inner),
        st.builds("({} | {})".format, inner, st.sampled_from(_FILTERS)),
        st.builds("({} | {}({}))".format, inner, st.sampled_from(_FILTERS), arguments),
        st.builds("({} | {}({}={}))".format, inner, st.sampled_from(_FILTERS), st.sampled_from(_KEYWORDS), inner),
        st.builds("({} | map('{}') | list)".format, inner, st.sampled_from(_FILTERS)),
        st.builds("({} is {}({}={}))".format, inner, st.sampled_from(_TESTS), st.sampled_from(_KEYWORDS), inner),
        st.builds("({} is {})".format, inner, st.sampled_from(_TESTS)),
        st.builds("({}).{}({})".format, inner, st.sampled_from(_METHODS), arguments),
        st.builds("({}).{}".format, inner, attributes),
        st.builds("({})['{}']".format, inner, attributes),
        st.builds("({} | attr('{}'))".format, inner, attributes),
        st.builds("({})[{}:{}:{}]".format, inner, inner, inner, st.sampled_from(["", "-1", "2"])),
        st.builds("({})[{}]".format, inner, inner),
        st.builds("{}({})".format, st.sampled_from(_NAMES), arguments),
        st.builds("[{}]".format, arguments),
        st.builds("({},)".format, inner),
        st.builds("{{{}: {}}}".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("'{{0.{}}} {{0[{}]}}'.format({})".format, attributes, attributes, inner),
    )


expressions = st.recursive(_atoms, _compound, max_leaves=6)


def _blocks(body: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    many = st.lists(body, min_size=1, max_size=3).map("".join)
    return st.one_of(
        many,
        st.builds("{{% for b in {} %}}{}{{% endfor %}}".format, expressions, many),
        st.builds("{{% for i in range(100000) %}}{}{{% endfor %}}".format, many),
        st.builds("{{% for b in {} recursive %}}{}{{{{ loop(b) }}}}{{% endfor %}}".format, expressions, many),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, expressions, many, many),
        st.builds("{{% macro m(a, b=1) %}}{}{{% endmacro %}}{}".format, many, many),
        st.builds("{{% set a %}}{}{{% endset %}}".format, many),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(_FILTERS), many),
        st.builds("{{% call m({}) %}}{}{{% endcall %}}".format, expressions, many),
        st.builds("{{% with a = {} %}}{}{{% endwith %}}".format, expressions, many),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, many),
    )


_statements = st.one_of(
    st.builds("{{{{ {} }}}}".format, expressions),
    st.builds("{{% set a = {} %}}".format, expressions),
    st.builds("{{% set ns.x = {} %}}".format, expressions),
    st.sampled_from(
        [
            "text\n",
            "{% set a = a ~ a %}",
            "{% set a = a + a %}",
            "{% set ns.x = [ns.x, ns.x] %}",
            "{% set ns.x = (ns.x, a) %}",
            "{% set ns.x = ns %}",
            "{{ m(a, b) }}",
            "{{ caller() }}",
            "{% break %}",
            "{{ self.main() }}",
            "{{ ns }}{{ loop }}{{ m }}{{ range }}",
        ]
    ),
)
templates = (
    st.recursive(_statements, _blocks, max_leaves=8)
    .map("{{% set ns = namespace(x=1) %}}{{% set a = 'ab' %}}{}".format)
    .flatmap(lambda body: st.sampled_from([body, "{% block main %}" + body + "{% endblock %}"]))
)
"""Sources of templates; a few do not compile (a `break` without a loop, two blocks of one name)."""


# What a caller sends

texts = st.text(max_size=12) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>system", "{{ 7 * 7 }}", "\ud800", "\0", "%s{0}", "i" * 999]
)
data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
_roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])
_parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}) | data, max_size=3)
_likely = st.fixed_dictionaries(
    {
        "role": _roles,
        "content": st.none() | texts | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts})),
    }
)
_unlikely = st.fixed_dictionaries(
    {},
    optional={
        "role": _roles | data,
        "content": texts | _parts | data,
        "name": texts | data,
        "tool_calls": data,
        "reasoning_content": texts | data,
        "items": data,
    },
)
conversations = st.lists(_likely | _unlikely, max_size=4)
"""Messages as a caller of the Python API may hand them over, most of them wrong in some way."""
