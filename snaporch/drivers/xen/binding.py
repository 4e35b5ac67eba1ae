"""libxl by ctypes, all of it that a snapshot driver needs. Only `helper` uses this, in a process of its own.

No struct has a layout here: each is filled by libxl's own reader of JSON and read by its own writer, in a buffer
far larger than it is. The functions that are called are the same from Xen 4.14 to 4.21.
Where a later version takes one more argument (`ao_how`), the earlier one does not look at it.
"""

from __future__ import annotations

import ctypes as c
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIVE = 2  # of libxl_domain_suspend
WARNINGS = 7  # XTL_WARN: what libxl says on standard error
DEBUG = 1
_GONE = (-6, -21)  # ERROR_INVAL, in earlier versions; ERROR_DOMAIN_NOTFOUND
_STRUCT_BYTES = 1 << 16  # libxl_domain_config has about 3 KiB
_LINE = re.compile(r"(?m)^[\w-]+: error: (?:[\w./-]+:\d+:[\w()]+: )?(?:Domain \d+:)?(.+?)\s*$")
_TEXTS = ("domain_config_to_json", "dominfo_to_json", "physinfo_to_json")


class LibxlError(Exception):
    """libxl says no.

    Attributes:
        call: the function, without ``libxl_``.
        code: its error number.
    """

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: libxl says {code}")
        self.call = call
        self.code = code


def last_error(log: str) -> str:
    """Return the words of the last error that libxl, or a program of its own, has logged; empty: there is none."""
    found = _LINE.findall(log)
    return str(found[-1]) if found else ""


def version() -> str:
    """Return the running hypervisor's version, for example ``4.17``; empty: there is none."""
    try:
        return ".".join(Path("/sys/hypervisor/version", part).read_text().strip() for part in ("major", "minor"))
    except OSError:
        return ""


def library() -> c.CDLL:
    """Return the libxl of the running hypervisor: they must be of one version.

    Raises:
        LibxlError: there is none.
    """
    wanted = f"libxenlight.so.{version()}"
    others = sorted(str(path) for path in Path("/usr/lib").glob("*/libxenlight.so.4.*"))
    for name in (wanted, *others):
        try:
            return c.CDLL(name)
        except OSError:
            continue
    raise LibxlError(f"load {wanted}", 0)


class Libxl:
    """A libxl context; one thread at a time uses it."""

    def __init__(self, level: int = WARNINGS) -> None:
        self._x, log = library(), c.CDLL("libxentoollog.so.1")
        libc = c.CDLL(None)
        self._free = libc.free
        self._free.argtypes = [c.c_void_p]
        log.xtl_createlogger_stdiostream.restype = c.c_void_p
        log.xtl_createlogger_stdiostream.argtypes = [c.c_void_p, c.c_int, c.c_uint]
        logger = log.xtl_createlogger_stdiostream(c.c_void_p.in_dll(libc, "stderr"), level, 0)
        self._context = c.c_void_p()
        for name in _TEXTS:
            getattr(self._x, f"libxl_{name}").restype = c.c_void_p
        self._call("ctx_alloc", c.byref(self._context), 0, 0, c.c_void_p(logger), context=False)

    def _call(self, name: str, *arguments: Any, context: bool = True) -> None:
        first = (self._context,) if context else ()
        code = getattr(self._x, f"libxl_{name}")(*first, *arguments)
        if code:
            raise LibxlError(name, code)

    @contextmanager
    def _struct(self, kind: str, value: Any = None) -> Iterator[Any]:
        buffer = c.create_string_buffer(_STRUCT_BYTES)
        getattr(self._x, f"libxl_{kind}_init")(buffer)
        try:
            if value is not None:
                self._call(f"{kind}_from_json", buffer, json.dumps(value).encode())
            yield buffer
        finally:
            getattr(self._x, f"libxl_{kind}_dispose")(buffer)

    def _json(self, kind: str, buffer: Any) -> Any:
        pointer = getattr(self._x, f"libxl_{kind}_to_json")(self._context, buffer)
        try:
            return json.loads(c.string_at(pointer).decode())
        finally:
            self._free(pointer)

    def config(self, domid: int) -> dict[str, Any]:
        """Return a domain's configuration as libxl knows it; also of one that has shut down."""
        with self._struct("domain_config") as buffer:
            self._call("retrieve_domain_configuration", c.c_uint32(domid), buffer, None)
            return dict(self._json("domain_config", buffer))

    def info(self, domid: int) -> dict[str, Any] | None:
        """Return how a domain is; what is false or default is left out. None: there is none."""
        with self._struct("dominfo") as buffer:
            try:
                self._call("domain_info", buffer, c.c_uint32(domid))
            except LibxlError as error:
                if error.code in _GONE:
                    return None
                raise
            return dict(self._json("dominfo", buffer))

    def physinfo(self) -> dict[str, Any]:
        """Return what hypervisor and host have: cap_hap, cap_shadow, free_pages and more."""
        with self._struct("physinfo") as buffer:
            self._call("get_physinfo", buffer)
            return dict(self._json("physinfo", buffer))

    def free_memory(self) -> int:
        """Return the bytes of memory that a new domain can have."""
        found = c.c_uint64(0)
        self._call("get_free_memory", c.byref(found))
        return found.value << 10

    def needed_memory(self, config: dict[str, Any]) -> int:
        """Return the bytes of memory that a domain of a configuration needs, overhead and all."""
        found = c.c_uint64(0)
        with self._struct("domain_config", config) as buffer:
            self._call("domain_need_memory", buffer, c.c_uint32(0xFFFFFFFF), c.byref(found))
        return found.value << 10

    def pause(self, domid: int) -> None:
        """Pause a domain; pauses are counted."""
        self._call("domain_pause", c.c_uint32(domid), None)

    def unpause(self, domid: int) -> None:
        """Take back one pause."""
        self._call("domain_unpause", c.c_uint32(domid), None)

    def destroy(self, domid: int) -> None:
        """End a domain."""
        self._call("domain_destroy", c.c_uint32(domid), None)

    def shutdown(self, domid: int) -> None:
        """Ask the guest to power off."""
        self._call("domain_shutdown", c.c_uint32(domid), None)

    def suspend(self, domid: int, fd: int, *, live: bool) -> None:
        """Write a domain's memory to a file; the guest is suspended on return."""
        self._call("domain_suspend", c.c_uint32(domid), c.c_int(fd), c.c_int(LIVE if live else 0), None)

    def resume(self, domid: int) -> None:
        """Let a suspended guest go on, as if its suspension had failed."""
        self._call("domain_resume", c.c_uint32(domid), c.c_int(1), None)

    def rename(self, domid: int, old: str, new: str) -> None:
        """Rename a domain."""
        self._call("domain_rename", c.c_uint32(domid), old.encode(), new.encode())

    def tell(self, domid: int, config: dict[str, Any]) -> None:
        """Have libxl know a domain by another configuration: it is what a reboot starts from."""
        data = json.dumps(config).encode()
        self._call("userdata_store", c.c_uint32(domid), b"libxl-json", data, c.c_int(len(data)))

    def create(self, config: dict[str, Any]) -> int:
        """Start a domain, paused before its first instruction; return its id."""
        domid = c.c_uint32(0)
        with self._struct("domain_config", config) as buffer:
            self._call("domain_create_new", buffer, c.byref(domid), None, None)
        return domid.value

    def restore(self, config: dict[str, Any], fd: int) -> int:
        """Start a domain with the memory that a file has from here on; it is paused at the point. Return its id."""
        domid = c.c_uint32(0)
        with (
            self._struct("domain_config", config) as buffer,
            self._struct("domain_restore_params", {"stream_version": 2}) as parameters,
        ):
            arguments = (buffer, c.byref(domid), c.c_int(fd), c.c_int(-1), parameters, None, None)
            self._call("domain_create_restore", *arguments)
        return domid.value
