"""JSON schemas at random, of keywords that are implemented, each of which something satisfies."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "age", "city", "tags", "note", "size", "kind", "unit", "left", "right", "é", 'a "b"', "x/y", "")
PATTERNS = (r"^[a-z]{2,8}$", r"^\d{4}-\d{2}$", r"^(yes|no|maybe)$", r"^[A-Z][a-z]+( [A-Z][a-z]+)?$")
FORMATS = ("date", "time", "date-time", "email", "ipv4", "uuid")


def random_schema(seed: int) -> dict[str, Any]:
    """The same schema for the same seed."""
    rng = random.Random(seed)
    schema = _object(rng, 3) if rng.random() < 0.8 else _any(rng, 3)
    if rng.random() < 0.2:
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves = (_string, _string, _integer, _number, _literal, _plain)
    inner = (_object, _object, _array, _array, _any_of, _all_of, _reference)
    return rng.choice(leaves)(rng) if depth == 0 or rng.random() < 0.4 else rng.choice(inner)(rng, depth - 1)


def _plain(rng: random.Random) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", "string", ["integer", "null"], ["boolean", "string"]])}


def _literal(rng: random.Random) -> dict[str, Any]:
    values = [*rng.sample(WORDS, 3), 7, -0.5, True, None, ["a", 1], {"k": "v"}]
    return {"const": rng.choice(values)} if rng.random() < 0.3 else {"enum": rng.sample(values, rng.randint(1, 4))}


def _string(rng: random.Random) -> dict[str, Any]:
    match rng.randrange(4):
        case 0:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case 1:
            return {"type": "string", "format": rng.choice(FORMATS)}
        case 2:
            least = rng.randint(0, 5)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 20)}
    return {"type": "string", "maxLength": 30}


def _integer(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(-200, 200)
    schema: dict[str, Any] = {"type": "integer", "minimum": least, "maximum": least + rng.randint(10, 1000)}
    if rng.random() < 0.2:
        schema["multipleOf"] = rng.randint(2, 7)
    return schema


def _number(rng: random.Random) -> dict[str, Any]:
    least = round(rng.uniform(-50, 50), 2)
    return {"type": "number", "minimum": least, rng.choice(["maximum", "exclusiveMaximum"]): least + rng.randint(1, 99)}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + rng.randint(1, 2)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, depth) for _ in range(rng.randint(1, 2))]
    return schema | {"items": _any(rng, depth)}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, max(0, depth - 1)) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }
    if rng.random() < 0.15:
        schema["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 9}
        schema |= {"required": names, "maxProperties": len(names) + 2}  # the two go together only so
    return schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _all_of(rng: random.Random, depth: int) -> dict[str, Any]:
    first, second = rng.sample(WORDS, 2)
    return {
        "allOf": [
            {"type": "object", "properties": {first: _any(rng, max(0, depth - 1))}, "required": [first]},
            {"type": "object", "properties": {second: _any(rng, 0)}, "required": [second]},
        ],
        "maxProperties": 2,
    }


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0:
        return _integer(rng)
    # Only at the top may a reference be found by "#/...": so it refers within a schema of its own.
    return {"$id": f"urn:s{rng.getrandbits(32)}", "$defs": {"it": _any(rng, 0)}, "$ref": "#/$defs/it"}
