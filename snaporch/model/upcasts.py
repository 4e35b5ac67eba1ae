"""Documents of earlier formats made into those of the next one; each may change the one that it is given."""

from __future__ import annotations

from typing import Any


def with_handles(document: dict[str, Any]) -> dict[str, Any]:
    """Of a domain or a snapshot: a QEMU process, which the core read, is a handle that its driver reads."""
    driver = document.get("definition", {}).get("driver", "qemu")
    if "process" in document:
        document["handle"] = document.pop("process")
    for key in ("handle", "template"):
        process = document.get(key)
        if process is not None and "pid" in process:
            document[key] = {"driver": driver, "id": f"{process['pid']}:{process['started']}", "data": process}
    return document


def without_node(document: dict[str, Any]) -> dict[str, Any]:
    """Of an overlay that is planned: its driver finds the name of its block node by itself."""
    document.pop("node", None)
    return document


def domains_listed(document: dict[str, Any]) -> dict[str, Any]:
    """Of an operation or its event: names with commas between are a list; no name was all domains."""
    names = document.pop("domain")
    return document | {"domains": names.split(",") if names else []}
