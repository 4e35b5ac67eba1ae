"""OpenAPI, generated: paths from the table of routes, schemas from the attrs classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import attrs

from snaporch.model.jsonschema import Schemas
from snaporch.service.call import Route


@attrs.frozen
class Problem:
    """What was wrong: RFC 9457, with the command line's exit status; further members say what the error knows."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    exit_code: int


_PARAMETERS: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    "after": {"type": "string"},
    "domain": {"type": "string"},
    "driver": {"type": "string"},
    "outcome": {"type": "string", "enum": ["complete", "rolled-back", "stranded", "running", "failed"]},
    "kind": {"type": "string", "enum": ["domain", "snapshot", "operation"]},
    "since": {"type": "number", "minimum": 0},
    "strategy": {"type": "string", "enum": ["background", "precopy", "paused", "internal"]},
    "measure": {"type": "boolean"},
    "discard": {"type": "boolean"},
    "wait": {"type": "number", "minimum": 0, "maximum": 3600},
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the OpenAPI document of a table of routes."""
    schemas = Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "snaporch", "version": version("snaporch"), "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


_ABOUT = "Live whole-system snapshots of virtual machines; see docs/how-to/service.md."


def _operation(route: Route, schemas: Schemas) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    parameters += [{"name": name, "in": "query", "schema": _PARAMETERS[name]} for name in route.query]
    described: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": (route.handler.__doc__ or "").strip().split("\n")[0],
        "tags": [route.path.split("/")[2]],
        "x-role": route.role.name.lower() if route.role else None,
        "parameters": parameters,
        "responses": _responses(route, schemas),
    }
    if route.body is not None:
        described["requestBody"] = {"required": True, "content": _json(schemas.of(route.body))}
    if route.method == "POST" and route.status == 202:  # noqa: PLR2004 - HTTP's number
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": {"type": "string"}})
    return described


def _responses(route: Route, schemas: Schemas) -> dict[str, Any]:
    problem = {"description": "a problem", "content": {"application/problem+json": {"schema": schemas.of(Problem)}}}
    if route.answer is None:
        return {str(route.status): {"description": "done"}, "default": problem}
    schema = schemas.of(route.answer)
    if route.page:
        following = {"type": ["string", "null"]}
        schema = {
            "type": "object",
            "properties": {"items": {"type": "array", "items": schema}, "next": following},
            "required": ["items", "next"],
        }
    statuses = {route.status, 200}
    return {str(s): {"description": "done", "content": _json(schema)} for s in sorted(statuses)} | {
        "default": problem
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
