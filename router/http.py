"""HTTP plumbing below FastAPI: bodies, headers, JSON and error responses, API keys."""

from __future__ import annotations

import hmac
import math
from collections.abc import Sequence
from http import HTTPStatus

import msgspec
from starlette.types import Receive, Scope, Send

from engine_core.errors import BatonError, CapacityError, RequestError

Headers = list[tuple[bytes, bytes]]

JSON_TYPE = (b"content-type", b"application/json")
SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
MAX_DISCARD_BYTES = 256 << 20  # of a refused body; what is larger is cut off

encode_json = msgspec.json.Encoder().encode


class HttpError(RequestError):
    """A request that fails for how it was sent.

    Args:
        close: end the connection with the answer.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, *, close: bool = False) -> None:
        super().__init__(message, param, code)
        self.close = close
        self.http_status = int(status)


class ClientGone(BatonError):
    """Nobody is there to answer."""

    http_status = 499
    code = "client_disconnected"


class ErrorBody(msgspec.Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


def error_json(error: BatonError) -> bytes:
    """`{"error": {...}}`."""
    status = error.http_status
    kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "server_error"
    param = error.param if isinstance(error, RequestError) else None
    return encode_json({"error": ErrorBody(str(error), kind, param, error.code)})


def header(scope: Scope, name: bytes) -> bytes | None:
    """First value of a header; `name` in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        HttpError: it is longer than `max_bytes`; at most that much was ever kept.
        ClientGone: the client left before its end.
    """
    length = header(scope, b"content-length")
    if length is not None and int(length) > max_bytes:
        raise _too_large(max_bytes, int(length) > MAX_DISCARD_BYTES)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes, False)
        return body
    pieces: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        piece = message.get("body", b"")
        size += len(piece)
        if size > max_bytes:
            pieces.clear()
        else:
            pieces.append(piece)
        if size > MAX_DISCARD_BYTES or (size > max_bytes and not message.get("more_body", False)):
            raise _too_large(max_bytes, size > MAX_DISCARD_BYTES)
        if not message.get("more_body", False):
            return b"".join(pieces)
        message = await receive()
    raise ClientGone("the client left before the end of its request")


def check_json_type(scope: Scope) -> None:
    """A body must be declared as JSON if it is declared at all: browsers can send anything else across sites."""
    kind = header(scope, b"content-type")
    if kind is not None and kind != b"application/json":
        media = kind.partition(b";")[0].strip().lower()
        if media != b"application/json" and not media.endswith(b"+json"):
            raise HttpError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"the content type must be application/json, not {media.decode('latin-1')!r}",
                "unsupported_media_type",
            )


class KeyCheck:
    """Bearer tokens; without keys everyone may enter."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __call__(self, scope: Scope) -> int | None:
        """Which key the client has; None where none is needed. Every key is compared, in constant time.

        Raises:
            HttpError: 401.
        """
        if not self._keys:
            return None
        scheme, _, given = (header(scope, b"authorization") or b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            message = (
                "Incorrect API key provided." if given else "No API key provided: send 'Authorization: Bearer KEY'."
            )
            raise HttpError(HTTPStatus.UNAUTHORIZED, message, "invalid_api_key")
        return matches.index(True)


async def send_json(send: Send, status: int, body: bytes, extra: Headers | None = None) -> None:
    """A whole response."""
    headers = [JSON_TYPE, (b"content-length", b"%d" % len(body)), *(extra or ())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: BatonError) -> None:
    """The OpenAI error object with its status."""
    extra: Headers = []
    status = error.http_status
    if isinstance(error, CapacityError):
        extra.append((b"retry-after", b"%d" % math.ceil(error.retry_after_s)))
        extra.append((b"x-baton-refused", error.reason.encode()))
    elif status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    elif isinstance(error, HttpError) and error.close:
        extra.append((b"connection", b"close"))
    await send_json(send, status, error_json(error), extra)


def _too_large(max_bytes: int, close: bool) -> HttpError:
    """A client that still sends would not read an answer on a connection that is closed: only the largest are."""
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return HttpError(status, f"the request body exceeds {max_bytes} bytes", "request_too_large", close=close)
