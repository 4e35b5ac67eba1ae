"""The service: one process owns a root, and any number of clients use it at once; see docs/how-to/service.md.

api.py       the table of everything that can be asked, and what answers it
app.py       makes an ASGI application of the table: who asks, how much, and what errors look like
jobs.py      the operations that were asked for: queued, running, ended
feed.py      what happens, numbered, for any number of followers
server.py    sockets, signals, systemd, the beginning and the end
"""

from __future__ import annotations
