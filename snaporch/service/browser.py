"""What the service sends to browsers, and what it refuses from them.

The dashboard is files: it has no rights of its own, asks what any client asks, and sends its token with each
request. So there is no cookie that another page could borrow. Two things remain. A page of somebody else can send
requests to an address of this machine, and a unix socket that was forwarded to a port (``ssh -L``) asks for no
token: these are refused by what browsers themselves say of them. And a name that leads here by somebody else's DNS
makes their page and us one origin: by such a name nobody gets in without a token.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from snaporch.errors import Forbidden

STATIC = Path(__file__).parent / "static"

# Nothing but these files, no script or style inside the page, no form that leads elsewhere, no frame around it.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for anew each time, which an ETag makes cheap: it belongs to this service
}


class Dashboard(StaticFiles):
    """The dashboard's files."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC, html=True)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """See StaticFiles."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def check_origin(headers: Mapping[str, str], *, local: bool) -> None:
    """Refuse what a browser sends on behalf of a page that is not ours.

    Args:
        headers: the request's.
        local: the caller is known only by its end of our unix socket.

    Raises:
        Forbidden: another page asks, or the name that we were asked by may be anybody's.
    """
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        raise Forbidden(
            "the request is from a page of another site; only the dashboard's own page may send requests"
        )
    if local and not _is_our_name(headers.get("host", "")):
        raise Forbidden("without a token, address the service as localhost: other host names are not trusted")


def _is_our_name(host: str) -> bool:
    """Return whether a name means this machine whatever DNS says: no name in DNS is without a dot."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return "." not in name or name.endswith(".localhost")
    return True
