"""What is exported, held to the schemas of tests/schemas: every key and no other, and the limits of the other side."""

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").iterdir()}


def strict(text: str) -> Any:
    """JSON as its standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def check(value: Any, schema: str) -> Any:
    """The value as a reader gets it, after its schema has been checked."""
    value = strict(json.dumps(value, allow_nan=False))
    jsonschema.validate(value, SCHEMAS[schema], cls=jsonschema.Draft202012Validator)
    return value
