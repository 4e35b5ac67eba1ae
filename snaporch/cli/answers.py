"""What each verb answers with ``--json``, as a JSON schema.

``python -m snaporch.cli.answers`` prints docs/reference/answers.schema.json: `$defs` has a schema for each verb, by
its name. A test compares the two, and the answers of the other tests are checked by them. Answers may gain keys.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from snaporch.batch.rehearsal import Forecast
from snaporch.batch.store import BatchRecord
from snaporch.model.archive import Exported, Imported
from snaporch.model.domain import Discovered, DomainState, ForwardedPort
from snaporch.model.finding import Finding
from snaporch.model.jsonschema import Schemas
from snaporch.model.merge import MergeKind, Where
from snaporch.model.record import (
    Boot,
    Estimate,
    Event,
    GivenUp,
    OperationRecord,
    Outcome,
    SnapshotRecord,
    SyncReport,
)
from snaporch.model.way import Way

Schema = dict[str, Any]
_classes = Schemas()

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _by_name(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _table(**keys: Schema) -> Schema:
    """Return the schema of an object with all of these keys."""
    return {"type": "object", "properties": keys, "required": sorted(keys)}


def _answer(**keys: Schema) -> Schema:
    """Return the schema of a whole answer, or of an entry of one, which says in which format it is."""
    return _table(format=WHOLE, **keys)


def _record(kind: Any, without: tuple[str, ...] = (), **more: Schema) -> Schema:
    """Return the schema of a record in full, but for some keys, and with others."""
    _classes.of(kind)
    known = _classes.components[kind.__name__]["properties"]
    properties = {key: value for key, value in known.items() if key not in without}
    return {"type": "object", "properties": {"format": WHOLE} | properties | more, "required": sorted(more)}


def _named(name: str, schema: Schema) -> Schema:
    """Return a reference to a schema that several verbs have."""
    _classes.components[name] = schema
    return {"$ref": f"#/components/schemas/{name}"}


_NAMES = _list(TEXT)
_WAY_BACK = {"way_back": _or_null(_classes.of(Way)), "way_back_reason": _or_null(TEXT)}
_DISK = _named(
    "Disk", _table(target=TEXT, active=TEXT, format=TEXT, readonly=FLAG, virtual_size=WHOLE, chain=_NAMES)
)
_DOMAIN = _named(
    "Domain",
    _answer(
        name=TEXT,
        state=_classes.of(DomainState),
        current=_or_null(TEXT),
        pid=_or_null(WHOLE),
        driver=TEXT,
        tags=_NAMES,
        max_depth=_or_null(WHOLE),
        disks=_list(_DISK),
        problem=_or_null(TEXT),
        records=_or_null(FLAG),
        origin=_or_null(_table(domain=TEXT, name=TEXT)),
        clock_behind_seconds=_or_null(NUMBER),
        generation=_or_null(TEXT),
        **_WAY_BACK,
    ),
)
_UNREADABLE_DOMAIN = _answer(name=TEXT, state={"type": "null"}, unreadable=TEXT)
_CREATED = _named(
    "Created",
    _answer(
        domain=TEXT,
        name=TEXT,
        outcome=_classes.of(Outcome),
        parent=_or_null(TEXT),
        domain_state=_classes.of(DomainState),
        kind=TEXT,
        strategy=TEXT,
        reason=TEXT,
        point=NUMBER,
        pause_seconds=_or_null(NUMBER),
        total_seconds=NUMBER,
        memory_file=_or_null(TEXT),
        memory_bytes=_or_null(WHOLE),
        memory_checksum=_or_null(TEXT),
        disks=_list(_table(target=TEXT, frozen=TEXT, active=TEXT, inside=_or_null(TEXT))),
        phases=_by_name(NUMBER),
        expected=_or_null(_classes.of(Estimate)),
        expires=_or_null(NUMBER),
        **_WAY_BACK,
    ),
)
_REVERTED = _named(
    "Reverted",
    _answer(
        domain=TEXT,
        name=TEXT,
        outcome=_classes.of(Outcome),
        way=TEXT,
        lazy=FLAG,
        lazy_reason=_or_null(TEXT),
        state=_classes.of(DomainState),
        current=_or_null(TEXT),
        saved=_or_null(TEXT),
        disks=_list(_DISK),
        outage_seconds=_or_null(NUMBER),
        total_seconds=NUMBER,
        clock_behind_seconds=_or_null(NUMBER),
        problems=_NAMES,
    ),
)
_MERGES = {
    "dry_run": FLAG,
    "outcome": _or_null(_classes.of(Outcome)),
    "bytes": WHOLE,
    "steps": _list(
        _table(kind=_classes.of(MergeKind), target=TEXT, top=TEXT, base=TEXT, bytes=WHOLE, where=_classes.of(Where))
    ),
    "unlink": _NAMES,
    "kept": _list(_table(path=TEXT, reason=TEXT)),
}
_DELETED = _named("Deleted", _answer(domain=TEXT, name=TEXT, deleted=_NAMES, **_MERGES))
_VERIFIED = _named(
    "Verified",
    _answer(
        domain=TEXT,
        name=TEXT,
        ok=FLAG,
        problems=_NAMES,
        booted=_or_null(FLAG),
        files=TEXT,
        boot=_or_null(_classes.of(Boot)),
        reason=_or_null(TEXT),
    ),
)
_LISTED = {
    "id": TEXT,
    "parent": _or_null(TEXT),
    "memory": FLAG,
    "domain_state": _classes.of(DomainState),
    "creation_time": NUMBER,
    "current": FLAG,
    "description": TEXT,
    "strategy": TEXT,
    "kind": TEXT,
    "bytes": WHOLE,
    "deleting": FLAG,
    "pinned": FLAG,
    "group": _or_null(_NAMES),
    "expires": _or_null(NUMBER),
}
_NOTHING = {key: {"type": "null"} for key in _LISTED}
_LINK = _answer(
    id=TEXT,
    name=TEXT,
    parent=_or_null(TEXT),
    parent_id=_or_null(TEXT),
    current=FLAG,
    memory=FLAG,
    kind=TEXT,
    creation_time=NUMBER,
    bytes=WHOLE,
)
_SHOWN = _named("Shown", _record(SnapshotRecord, name=TEXT, current=FLAG, bytes=WHOLE))
_OPERATION = _named("Operation", _record(OperationRecord, without=("notes",), outcome=_or_null(TEXT)))
_BATCH = _record(BatchRecord, outcome=TEXT)
_ITEM = _named(
    "BatchItem",
    _table(
        name=TEXT,
        domains=_NAMES,
        snapshot=TEXT,
        end=TEXT,
        taken=FLAG,
        attempts=WHOLE,
        begun=NUMBER,
        ended=NUMBER,
        expected_seconds=_or_null(NUMBER),
        pause_seconds=_or_null(NUMBER),
        memory_bytes=_or_null(WHOLE),
        verified=_or_null(FLAG),
        error=TEXT,
        deleted=_NAMES,
        problems=_NAMES,
    ),
)


def _of_group(member: Schema, **more: Schema) -> Schema:
    return _answer(name=TEXT, outcome=_classes.of(Outcome), members=_list(member), **more)


def _with_items(batch: Schema) -> Schema:
    return batch | {"properties": batch["properties"] | {"items": _list(_ITEM)}}


ANSWERS: dict[str, Schema] = {
    **dict.fromkeys(
        [
            f"domain {verb}"
            for verb in [
                "define",
                "start",
                "shutdown",
                "destroy",
                "reset",
                "reboot",
                "pause",
                "resume",
                "tag",
                "depth",
                "attach",
                "show",
            ]
        ],
        _DOMAIN,
    ),
    "domain undefine": _answer(name=TEXT, undefined=FLAG),
    "domain screenshot": _answer(domain=TEXT, file=TEXT, bytes=WHOLE),
    "domain logs": _list(_answer(file=TEXT, lines=_NAMES)),
    "domain sync": _record(SyncReport),
    "domain discover": _list(_record(Discovered)),
    "domain list": _one_of(_list(_one_of(_DOMAIN, _UNREADABLE_DOMAIN)), _NAMES),
    "clone": _list(
        _answer(
            name=TEXT,
            state=_classes.of(DomainState),
            ports=_list(_record(ForwardedPort)),
            **{"from": _table(domain=TEXT, name=TEXT)},
        )
    ),
    "create": _one_of(_CREATED, _of_group(_CREATED, pause_seconds=_or_null(NUMBER))),
    "list": _one_of(
        _list(
            _one_of(
                _answer(name=TEXT, **_LISTED),
                _answer(name=TEXT, unreadable=TEXT, **_NOTHING),
            )
        ),
        _NAMES,
    ),
    "tree": _list(_LINK),
    "show": _SHOWN,
    "edit": _SHOWN,
    "revert": _one_of(_REVERTED, _of_group(_REVERTED)),
    "delete": _one_of(_DELETED, _of_group(_DELETED)),
    "flatten": _answer(domain=TEXT, name=_or_null(TEXT), **_MERGES),
    "pin": _answer(domain=TEXT, name=TEXT, pinned=FLAG),
    "verify": _one_of(_VERIFIED, _list(_VERIFIED)),
    "prune": _list(_answer(domain=TEXT, keep=_by_name(TEXT), delete=_by_name(TEXT))),
    "export": _record(Exported),
    "export-disk": _record(Exported),
    "import": _record(Imported),
    "batch check": _answer(plan=TEXT, ok=FLAG),
    "batch plan": _answer(plan=TEXT, goes_on_with=_or_null(TEXT), domains=_NAMES, delete=_by_name(_by_name(TEXT))),
    "batch rehearse": _record(Forecast),
    "batch run": _with_items(_BATCH),
    "batch show": _with_items(_BATCH),
    "batch list": _list(_BATCH),
    "batch orphans": _list(_answer(plan=TEXT, snapshots=_by_name(_NAMES))),
    "batch adopt": _answer(plan=TEXT, batches=WHOLE),
    "batch schedule": {"type": "null"},
    "serve": _answer(stopped=FLAG),
    "token make": _answer(name=TEXT, role=TEXT, token=TEXT),
    "token list": _list(_answer(name=TEXT, role=TEXT, made=NUMBER)),
    "token revoke": _answer(name=TEXT, revoked=FLAG),
    "watch": _record(Event),
    "doctor": _by_name({"type": "object"}) | {"properties": {"format": WHOLE}},
    "operations": _list(_OPERATION),
    "operations give-up": _record(GivenUp),
    "recover": _list(_OPERATION),
    "fsck": _list(_record(Finding)),
    "demo": {"type": "object"},
    "completion": _answer(shell=TEXT, script=TEXT),
}


def document() -> Schema:
    """Return all of it: verbs in `$defs`, and what they refer to in `components`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "what snaporch answers with --json, by verb",
        "$defs": ANSWERS,
        "components": {"schemas": dict(sorted(_classes.components.items()))},
    }


def text() -> str:
    """Return the schemas as they are published."""
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
