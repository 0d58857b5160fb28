"""What a client says beside the body, in headers: its session, tenant, priority and patience."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from router.http import Headers, HttpError, header

SESSION_HEADERS = (b"x-session-id", b"x-dynamo-session-id", b"session-id")
TENANT_HEADERS = (b"x-tenant-id", b"x-llm-d-inference-fairness-id")
DEADLINE_HEADERS = (b"x-ttft-deadline-ms", b"x-llm-d-slo-ttft-ms")
PRIORITY_HEADER = b"x-priority"
TRACE_HEADER = b"traceparent"
DEBUG_HEADER = b"x-baton-debug"
WISHING = (b"x-", b"session", TRACE_HEADER)  # how the names of all these begin
MAX_NAME_BYTES = 256
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Wishes:
    """Of one HTTP request.

    Attributes:
        session: requests of one session go where its last one went, if nothing speaks against it.
        tenant: shares of a crowded service are per tenant.
        priority: larger goes first; 0 is normal.
        ttft_s: when the first token is due; None: the gateway's default.
        debug: answer with a header that names the workers.
        traceparent: W3C's, of the trace that the request is part of.
    """

    session: str | None = None
    tenant: str = ""
    priority: int = 0
    ttft_s: float | None = None
    debug: bool = False
    traceparent: str = ""


NO_WISHES = Wishes()


def read_wishes(headers: Headers, key_index: int | None) -> Wishes:
    """From the headers of a request.

    Args:
        key_index: which API key the client proved; it is the tenant then, whatever it calls itself.

    Raises:
        HttpError: a value that cannot be.
    """
    for name, _ in headers:
        if name.startswith(WISHING):
            break
    else:
        return NO_WISHES if key_index is None else Wishes(tenant=f"key-{key_index}")
    tenant = _name(headers, TENANT_HEADERS) or "" if key_index is None else f"key-{key_index}"
    deadline_ms = _number(headers, DEADLINE_HEADERS, 1, 86_400_000)
    return Wishes(
        session=_name(headers, SESSION_HEADERS),
        tenant=tenant,
        priority=_number(headers, (PRIORITY_HEADER,), -MAX_PRIORITY, MAX_PRIORITY) or 0,
        ttft_s=deadline_ms / 1000 if deadline_ms is not None else None,
        debug=header(headers, DEBUG_HEADER) is not None,
        traceparent=(header(headers, TRACE_HEADER) or b"")[:MAX_NAME_BYTES].decode("latin-1"),
    )


def _first(headers: Headers, names: tuple[bytes, ...]) -> tuple[bytes, bytes] | None:
    for name in names:
        value = header(headers, name)
        if value is not None:
            return name, value
    return None


def _name(headers: Headers, names: tuple[bytes, ...]) -> str | None:
    found = _first(headers, names)
    if found is None:
        return None
    if len(found[1]) > MAX_NAME_BYTES:
        raise _bad(found[0], f"must have at most {MAX_NAME_BYTES} bytes")
    return found[1].decode("latin-1")


def _number(headers: Headers, names: tuple[bytes, ...], least: int, most: int) -> int | None:
    found = _first(headers, names)
    if found is None:
        return None
    try:
        value = int(found[1])
    except ValueError:
        raise _bad(found[0], "must be an integer") from None
    if not least <= value <= most:
        raise _bad(found[0], f"must be in {least}..{most}")
    return value


def _bad(name: bytes, text: str) -> HttpError:
    return HttpError(HTTPStatus.BAD_REQUEST, f"header {name.decode()} {text}", "invalid_header", name.decode())
