"""The format of plans as a JSON schema, made from the classes of `snaporch.batch.plan`; no I/O.

``python -m snaporch.batch.schema`` prints it; docs/reference/batch.schema.json holds it, and a test compares both.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from snaporch.batch.plan import Plan
from snaporch.model.jsonschema import Schemas
from snaporch.model.names import NAME
from snaporch.model.units import Seconds, Size

_TEXT: dict[Any, dict[str, Any]] = {
    Seconds: {"type": ["number", "string"], "minimum": 0, "pattern": r"^\s*\d+(\.\d+)?\s*(s|min|h|d|w)\s*$"},
    Size: {
        "type": ["integer", "string"],
        "minimum": 0,
        "pattern": r"^\s*\d+\s*([KkMmGgTt]([Ii]?[Bb])?|[Bb])?(/s)?\s*$",
    },
}


def plan_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12)."""
    schema = Schemas(_TEXT, inline=True, null=False).of(Plan)
    schema["properties"]["name"]["pattern"] = f"^{NAME.pattern}$"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "snaporch batch plan"}


def text() -> str:
    """Return the schema as it is published."""
    return json.dumps(plan_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
