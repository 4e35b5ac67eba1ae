"""How logs are written: to standard error, of which nothing else depends."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import structlog

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _StandardError:
    """Standard error as it is when something is written; a line that cannot be is lost, and nothing but the line.

    Whoever read it may be gone, and its disk full: no operation fails for that.
    """

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


def _for_people() -> structlog.dev.ConsoleRenderer:
    import structlog.dev  # noqa: PLC0415

    # Where there is rich, structlog would have it draw all local variables: gigabytes of them, secrets included.
    plain = structlog.dev.plain_traceback
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)


def log_of_a_command(verbose: int) -> None:
    """Log what is said at this level, for people."""
    import structlog  # noqa: PLC0415 - slow, and nothing to a verb that asks only the catalog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            _for_people(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[min(verbose, len(_LEVELS) - 1)]),
        logger_factory=structlog.PrintLoggerFactory(_StandardError()),  # type: ignore[arg-type]
    )


def log_of_a_service(how: str, verbose: int) -> None:
    """Log ``json`` or ``console``, with the operation in every line that is about one."""
    import structlog  # noqa: PLC0415 - as above

    from snaporch.service.log import LogWriter  # noqa: PLC0415 - a command has no use for it

    json = how == "json"
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if json else "%H:%M:%S", utc=json),
        structlog.processors.format_exc_info if json else structlog.processors.StackInfoRenderer(),
        structlog.processors.JSONRenderer() if json else _for_people(),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(LogWriter()),  # type: ignore[arg-type]
    )
