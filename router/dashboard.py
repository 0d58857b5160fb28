"""`/dashboard`: a page that needs nothing but this gateway, and the state that it shows.

The page itself holds no data and is served to anyone, as a browser cannot send a key when it opens an address; the
state is behind the same keys as the API, and the page asks for one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from router.http import KeyCheck, encode_json
from router.registry import WorkerState
from router.service import Service
from router.version import version
from router.worker_metrics import kv_usage, latest_lives, link_names

STATIC = Path(__file__).parent / "static"
PAGES = {
    "/dashboard": ("dashboard.html", "text/html; charset=utf-8"),
    "/dashboard/style.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard/app.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/dashboard/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_dashboard_routes(app: FastAPI, service: Service, check_key: KeyCheck) -> None:
    """The page, what it loads, and its state."""
    started_at = time.time()

    def add_page(path: str, name: str, media_type: str) -> None:
        body = (STATIC / name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(body, headers=HEADERS, media_type=media_type)

    for path, (name, media_type) in PAGES.items():
        add_page(path, name, media_type)

    @app.get("/dashboard/state")
    async def state(request: Request) -> Response:
        """Everything that the dashboard shows."""
        check_key(request.headers.raw)
        body = encode_json({"started_at": started_at, **describe(service)})
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")


def describe(service: Service) -> dict[str, Any]:
    """The state of a gateway and of its workers, for JSON."""
    metrics, config = service.metrics, service.config
    workers = latest_lives(service.registry.workers.values())
    return {
        "version": version(),
        "model": config.model_name,
        "system_fingerprint": service.fingerprint,
        "at": time.time(),
        "status": "draining" if service.draining else "ready" if service.registry.ready else "waiting for workers",
        "slo": {"ttft_s": config.slo_ttft_s, "itl_s": config.slo_itl_s},
        "totals": {
            "choices": dict(metrics.choices),
            "within_slo": metrics.within_slo,
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.cached_tokens,
            "generated_tokens": metrics.generated_tokens,
            "running": metrics.running_streams,
            "retries": sum(metrics.retries.values()),
        },
        "workers": [_worker(worker) for worker in workers],
        "links": _links(workers),
        "history": list(service.history.points),
        "slowest": service.slow_requests.slowest(),
        "fleet": service.fleet,
    }


def _worker(worker: WorkerState) -> dict[str, Any]:
    info, load, stats = worker.info, worker.load, worker.stats
    return {
        "worker": info.worker_id,
        "role": info.role,
        "incarnation": info.incarnation,
        "state": _state(worker),
        "address": f"{info.address.host}:{info.address.port}",
        "slots": info.num_slots,
        "pages": info.num_pages,
        "kv_usage": kv_usage(worker),
        "running": load.running if load else None,
        "waiting": load.waiting if load else None,
        "queued_tokens": load.queued_tokens if load else None,
        "free_pages": load.free_pages if load else None,
        "preemptions": load.preemptions if load else None,
        "compiles_after_warmup": load.compiles_after_warmup if load else None,
        "memory_used_bytes": stats.memory_used_bytes if stats else None,
        "memory_limit_bytes": stats.memory_limit_bytes if stats else None,
    }


def _state(worker: WorkerState) -> str:
    if not worker.connected:
        return "away"
    if worker.leaving or (worker.load is not None and worker.load.draining):
        return "draining"
    return "suspect" if worker.candidate.suspect else "ready"


def _links(workers: list[WorkerState]) -> list[dict[str, Any]]:
    names = link_names(workers)
    return [
        {
            "prefill": names.get(source, source),
            "decode": worker.info.worker_id,
            "transfers": link.transfers,
            "failures": link.failures,
            "bytes": link.num_bytes,
            "seconds": link.seconds,
        }
        for worker in workers
        if worker.stats is not None
        for source, link in worker.stats.links.items()
    ]
