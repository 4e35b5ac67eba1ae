"""Errors as problem documents (RFC 9457), and back: the client raises what the service has caught. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from snaporch import errors
from snaporch.errors import SnaporchError
from snaporch.model.convert import converter

MEDIA_TYPE = "application/problem+json"
_MEMBERS = frozenset({"type", "title", "status", "detail", "error", "exit_code"})


def problem(error: SnaporchError) -> dict[str, Any]:
    """Return the document of an error: its text, its codes, and what it knows."""
    name = type(error).__name__
    details = {key: value for key, value in vars(error).items() if not key.startswith("_")}
    known: dict[str, Any] = converter.unstructure(details)
    return known | {
        "type": f"urn:snaporch:problem:{name}",
        "title": HTTPStatus(error.http_status).phrase,
        "status": error.http_status,
        "detail": str(error),
        "error": name,
        "exit_code": error.exit_code,
    }


def error_of(document: Mapping[str, Any]) -> SnaporchError:
    """Return the error of a document; one of a class that is not known here is a plain `SnaporchError`."""
    name = document.get("error", "")
    kind: type[SnaporchError] = getattr(errors, name) if name in errors.__all__ else SnaporchError
    error = kind.__new__(kind)  # its parameters are not its text; its attributes are all here
    error.args = (document.get("detail") or "the service gave no reason",)
    details = {key: value for key, value in document.items() if key not in _MEMBERS}
    vars(error).update({key: tuple(v) if isinstance(v, list) else v for key, v in details.items()})
    return error
