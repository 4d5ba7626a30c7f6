"""JSON schemas drawn at random, whose answers are short."""

import random
from typing import Any


def written_schema(seed: int) -> dict[str, Any]:
    """A schema of an object, always the same for a seed."""
    draw = random.Random(seed)
    schema = _object(draw, 2)
    if draw.random() < 0.3:
        schema["$defs"] = {"part": _object(draw, 0)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
        schema["required"].append("part")
    return schema


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["a", "b c", "größe", 'q"', "id", "x_1"], draw.randint(1, 3))
    properties = {name: _value(draw, depth) for name in names}
    required = [name for name in names if draw.random() < 0.8]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["text", "pattern", "enum", "const", "integer", "number", "boolean", "null", "format"]
    kind = draw.choice(kinds if not depth else [*kinds, "object", "array", "union", "tuple"])
    match kind:
        case "text":
            least = draw.randint(0, 2)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 5)}
        case "pattern":
            return {"type": "string", "pattern": draw.choice([r"^[A-Z]{2}\d{1,3}$", r"^(ab|c)$"])}
        case "enum":
            return {"enum": draw.sample(["red", "grün", 1, 2.5, None, True], draw.randint(1, 4))}
        case "const":
            return {"const": draw.choice(["x", 7, False, {"k": [1]}])}
        case "integer":
            least = draw.randint(-20, 20)
            return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 300)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": 1}
        case "format":
            return {"type": "string", "format": draw.choice(["date", "time", "uuid", "ipv4"])}
        case "object":
            return _object(draw, depth - 1)
        case "array":
            return {
                "type": "array",
                "items": _value(draw, depth - 1),
                "minItems": draw.randint(0, 1),
                "maxItems": draw.randint(1, 3),
            }
        case "tuple":
            first, second = _value(draw, depth - 1), _value(draw, depth - 1)
            return {"type": "array", "prefixItems": [first, second], "items": False, "minItems": 2}
        case "union":
            return {"anyOf": [_value(draw, depth - 1), _value(draw, depth - 1)]}
        case _:
            return {"type": kind}
