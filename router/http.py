"""HTTP plumbing below FastAPI: bodies, headers, JSON and error responses, API keys."""

from __future__ import annotations

import hmac
import math
from collections.abc import Sequence
from http import HTTPStatus

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from engine_core.errors import BatonError, CapacityError, RequestError

Headers = list[tuple[bytes, bytes]]

JSON_TYPE = (b"content-type", b"application/json")
SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
CLIENT_GONE = 499  # a status for the metrics only

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


def header(headers: Headers, name: bytes) -> bytes | None:
    """First value of a header; `name` in lower case."""
    for key, value in headers:
        if key == name:
            return value
    return None


def check_json_type(headers: Headers) -> None:
    """A body must be declared as JSON if it is declared at all: browsers can send anything else across sites."""
    kind = header(headers, b"content-type")
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

    def __call__(self, headers: Headers) -> int | None:
        """Which key the client has; None where none is needed. Every key is compared, in constant time.

        Raises:
            HttpError: 401.
        """
        if not self._keys:
            return None
        scheme, _, given = (header(headers, b"authorization") or b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            message = (
                "Incorrect API key provided." if given else "No API key provided: send 'Authorization: Bearer KEY'."
            )
            raise HttpError(HTTPStatus.UNAUTHORIZED, message, "invalid_api_key")
        return matches.index(True)


def error_headers(error: BatonError) -> Headers:
    """Of the response that tells an error."""
    if isinstance(error, CapacityError):
        return [
            JSON_TYPE,
            (b"retry-after", b"%d" % math.ceil(error.retry_after_s)),
            (b"x-baton-refused", error.reason.encode()),
        ]
    return [JSON_TYPE, (b"www-authenticate", b"Bearer")] if error.http_status == 401 else [JSON_TYPE]


def response_head(status: int, headers: Headers, *, close: bool) -> bytes:
    """Status line and headers.

    Args:
        close: say that the connection takes no other request.
    """
    lines = [b"%s: %s\r\n" % pair for pair in headers]
    if close:
        lines.append(b"connection: close\r\n")
    fields = b"".join(lines)
    if fields.count(b"\n") != len(lines) or fields.count(b"\r") != len(lines):
        raise RuntimeError("a header holds a line break")
    return b"%s%s\r\n" % (STATUS_LINE[status], fields)
