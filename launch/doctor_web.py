"""From an address to what its server says, in bounded time and without following it elsewhere."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import LaunchError

ANSWER_SECONDS = 5.0
"""A healthy server answers in milliseconds, a busy one in a second."""
MOST_BYTES = 1 << 22
SCHEMES = ("http://", "https://")


class Unreachable(LaunchError):
    """A server gave no answer."""


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    text: str


def ask_web(url: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
    """Give a server's answer, also where it refuses.

    Args:
        url: http or https.
        headers: Of the request.
        body: Posted as JSON; None gets.

    Raises:
        Unreachable: No answer in `ANSWER_SECONDS`, or not one of a web server.
    """
    if not url.startswith(SCHEMES):
        raise Unreachable(f"{url} does not start with http:// or https://")
    opener = urllib.request.build_opener(_Stay)
    sent = {**headers, **({"Content-Type": "application/json"} if body is not None else {})}
    try:
        request = urllib.request.Request(url, data=body, headers=sent)
        with opener.open(request, timeout=ANSWER_SECONDS) as reply:
            return Answer(reply.status, reply.read(MOST_BYTES).decode(errors="replace"))
    except urllib.error.HTTPError as exc:
        with exc:
            return Answer(exc.code, exc.read(MOST_BYTES).decode(errors="replace"))
    except urllib.error.URLError as exc:
        raise Unreachable(str(exc.reason)) from exc
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise Unreachable(str(exc) or type(exc).__name__) from exc


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the credentials along to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None
