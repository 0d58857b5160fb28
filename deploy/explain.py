"""`baton explain`: why a request went where it did, asked of the gateway that placed it."""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx

from engine_core.errors import ConfigError

TIMEOUT_S = 10.0
TRIES = 16  # gateways of one machine share the port: each new connection may reach another one
COLUMNS = ("queue", "fetch", "prefill", "transfer", "itl", "crowding", "followers", "affinity")


def run(url: str, request_id: str, api_key: str | None, as_json: bool) -> int:
    """Print the decisions of a recent request.

    Args:
        url: base URL of the OpenAI API.
        request_id: what the answer's `id` says, with or without its prefix.

    Raises:
        ConfigError: no gateway answers there, or none knows the request.
    """
    answer = _ask(f"{url.rstrip('/').removesuffix('/v1')}/explain/{request_id}", api_key)
    sys.stdout.write(json.dumps(answer) + "\n" if as_json else describe(answer))
    return 0


def describe(answer: dict[str, Any]) -> str:
    """A table per attempt: the pair chosen, those that came next, and each term in milliseconds."""
    lines = []
    for attempt in answer["attempts"]:
        lines.append(
            f"request {answer['request_id']}, attempt {attempt['epoch'] + 1}: "
            f"{attempt['num_tokens']} tokens, {attempt['num_weighed']} pairs weighed"
        )
        rows = [
            ("", "PREFILL", "DECODE", "DONOR", "HELD P/D", "FETCHED", "COST MS", *(name.upper() for name in COLUMNS))
        ]
        rows += [_row("->" if i == 0 else "", o) for i, o in enumerate([attempt["chosen"], *attempt["others"]])]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"not considered: {worker}: {reason}" for worker, reason in sorted(attempt["excluded"].items())]
        lines.append("")
    return "\n".join(lines)


def _row(mark: str, option: dict[str, Any]) -> tuple[str, ...]:
    terms = [option["terms"][f"{name}_s"] for name in COLUMNS]
    return (
        mark,
        option["prefill"] or "(itself)",
        option["decode"],
        option["donor"] or "-",
        f"{option['held_prefill_tokens']}/{option['held_decode_tokens']}",
        str(option["fetched_tokens"]),
        *(f"{1000 * seconds:.2f}" for seconds in (sum(terms), *terms)),
    )


def _ask(url: str, api_key: str | None) -> dict[str, Any]:
    headers = {"connection": "close"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    reply = None
    try:
        for _ in range(TRIES):
            reply = httpx.get(url, headers=headers, timeout=TIMEOUT_S)
            if reply.status_code != httpx.codes.NOT_FOUND:
                break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"no gateway answers at {url}: {error}") from None
    assert reply is not None
    if reply.status_code != httpx.codes.OK:
        try:
            message = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {reply.status_code}"
        raise ConfigError(f"{url}: {message}")
    answer: dict[str, Any] = reply.json()
    return answer
