"""A page of the journal: which operations, and the SQL that finds them."""

from __future__ import annotations

import json

import attrs


@attrs.frozen
class Page:
    """Which operations, newest first.

    Attributes:
        limit: how many at most; -1: all.
        before: when the oldest one after them began, and its id.
        domain: of this one only.
        since: that began at this instant or later.
        outcome: an ended one's state; ``running``: those that have not ended; ``failed``: those that ended in
            another state than complete.
        but: ids of operations that are left out.
    """

    limit: int = -1
    before: tuple[float, str] | None = None
    domain: str | None = None
    since: float | None = None
    outcome: str | None = None
    but: tuple[str, ...] = ()

    def has(self, outcome: str | None) -> bool:
        """Return whether an operation that ended so, or not yet, is one of them."""
        if self.outcome is None:
            return True
        if self.outcome == "running":
            return outcome is None
        return outcome not in {None, "complete"} if self.outcome == "failed" else outcome == self.outcome

    def query(self) -> tuple[str, list[object]]:
        """Return it as SQL and its values."""
        where, values = ["TRUE"], list[object]()
        state = "CASE WHEN json_valid(record) THEN json_extract(record, '$.state') END"
        if self.before is not None:
            where.append("(operation.begun, id) < (?, ?)")
            values += self.before
        if self.since is not None:
            where.append("operation.begun >= ?")
            values.append(self.since)
        if self.but:
            where.append("id NOT IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(self.but))
        if self.outcome == "running":
            where += ["ended IS NULL", f"{state} <> 'stranded'"]
        elif self.outcome == "failed":
            where.append(f"{state} IN ('rolled-back', 'stranded')")
        elif self.outcome is not None:
            where.append(f"{state} = ?")
            values.append(self.outcome)
        source = "operation"
        if self.domain is not None:
            source = "operation_member AS member JOIN operation ON id = member.operation"
            where.append("member.domain = ?")
            values.append(self.domain)
        order = "member.begun DESC, id DESC" if self.domain is not None else "begun DESC, id DESC"
        condition = " AND ".join(where)
        query = f"SELECT record FROM {source} WHERE {condition} ORDER BY {order} LIMIT ?"  # noqa: S608 - nothing of a caller's is in it
        return query, [*values, self.limit]
