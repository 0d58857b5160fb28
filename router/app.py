"""The gateway's ASGI application."""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from msgspec import Struct
from starlette.exceptions import HTTPException

from engine_core.errors import BatonError
from router.dashboard import add_dashboard_routes
from router.dialects import ChatDialect, CompletionDialect, model_not_found
from router.endpoint import GenerateEndpoint
from router.http import HttpError, KeyCheck, encode_json, error_json
from router.http_exchange import Endpoint
from router.metrics import CONTENT_TYPE
from router.openai_types import ChatBody, CompletionBody
from router.service import Service
from router.version import version

logger = logging.getLogger(__name__)

BODIES: dict[str, type[Struct]] = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
REF_TEMPLATE = "#/components/schemas/{name}"
STATUS_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class GatewayApp(FastAPI):
    """FastAPI; what it says of the API holds for the generating endpoints, too."""

    def openapi(self) -> dict[str, Any]:
        """Adds what FastAPI does not route."""
        if self.openapi_schema is None:
            schema = super().openapi()
            refs, components = msgspec.json.schema_components(BODIES.values(), ref_template=REF_TEMPLATE)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
            for (path, body), ref in zip(BODIES.items(), refs, strict=True):
                schema["paths"][path] = {
                    "post": {
                        "summary": (body.__doc__ or path).splitlines()[0],
                        "requestBody": {"required": True, "content": {"application/json": {"schema": ref}}},
                        "responses": {"200": {"description": "The answer, or a stream of server-sent events"}},
                    }
                }
        return super().openapi()


def build_endpoints(service: Service) -> dict[str, Endpoint]:
    """The generating endpoints, which are served below ASGI, by path."""
    check_key = KeyCheck(service.config.api_keys)
    return {
        "/v1/chat/completions": GenerateEndpoint(service, ChatDialect(service), check_key),
        "/v1/completions": GenerateEndpoint(service, CompletionDialect(service), check_key),
    }


def build_app(service: Service) -> FastAPI:
    """All routes of the gateway but POST to the generating endpoints."""
    app = GatewayApp(title="Baton", version=version(), openapi_url="/openapi.json", redoc_url=None)
    check_key = KeyCheck(service.config.api_keys)
    for path in BODIES:
        app.add_route(path, _use_post, ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"], include_in_schema=False)
    _add_model_routes(app, service, check_key)
    _add_operator_routes(app, service, check_key)
    _add_explanation_route(app, service, check_key)
    add_dashboard_routes(app, service, check_key)
    _add_error_handlers(app)
    return app


async def _use_post(request: Request) -> Response:
    raise HttpError(405, "use POST", STATUS_CODES[405])


def _add_model_routes(app: FastAPI, service: Service, check_key: KeyCheck) -> None:
    created = int(time.time())

    def model() -> dict[str, Any]:
        max_len = service.registry.max_model_len or None
        return {
            "id": service.config.model_name,
            "object": "model",
            "created": created,
            "owned_by": "baton",
            "max_model_len": max_len,
        }

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        """The model served."""
        check_key(request.headers.raw)
        return _json({"object": "list", "data": [model()]})

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str, request: Request) -> Response:
        """One model."""
        check_key(request.headers.raw)
        if model_id != service.config.model_name:
            raise model_not_found(model_id)
        return _json(model())


def _add_operator_routes(app: FastAPI, service: Service, check_key: KeyCheck) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the process lives."""
        return _json({"status": "ok"})

    @app.get("/-/healthz", include_in_schema=False)
    async def serve_health() -> Response:
        """Where KubeRay asks Serve's own proxies, whose place the gateway takes on its port."""
        return Response("success", 503 if service.draining else 200, media_type="text/plain")

    @app.get("/readiness")
    async def readiness() -> Response:
        """Whether requests can be served: 503 until every role is there, and while draining."""
        registry = service.registry
        ready = registry.ready and not service.draining
        body = {
            "status": "draining" if service.draining else "ready" if ready else "waiting for workers",
            "prefill": len(registry.prefill),
            "decode": len(registry.decode),
        }
        return _json(body, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.expose(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version")
    async def get_version() -> Response:
        """Of this gateway."""
        return _json({"version": version(), "system_fingerprint": service.fingerprint})

    @app.get("/config")
    async def config(request: Request) -> Response:
        """The configuration, without secrets."""
        check_key(request.headers.raw)
        return _json(service.config.public())


def _add_explanation_route(app: FastAPI, service: Service, check_key: KeyCheck) -> None:
    @app.get("/explain/{request_id}")
    async def explain(request_id: str, request: Request) -> Response:
        """Why a recent request went where it did: the decisions of all its attempts, in seconds."""
        check_key(request.headers.raw)
        decisions = service.decisions.of(request_id.rpartition("-")[2])
        if not decisions:
            message = f"This gateway does not know the request '{request_id[:200]}' (any more)."
            raise HttpError(404, message, "unknown_request", "request_id")
        return _json({"request_id": decisions[0].request_id, "attempts": decisions})


def _add_error_handlers(app: FastAPI) -> None:
    """Whatever goes wrong, the client gets OpenAI's error object."""

    @app.exception_handler(BatonError)
    async def baton_error(request: Request, error: BatonError) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        url = f"{request.method} {request.url.path}"
        message = {404: f"Unknown request URL: {url}.", 405: f"Not allowed: {url}."}.get(
            error.status_code, error.detail
        )
        code = STATUS_CODES.get(error.status_code, "http_error")
        return _error(HttpError(error.status_code, message, code), error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _error(BatonError("the server had an error while processing your request"))


def _json(body: Any, status: int = 200) -> Response:
    return Response(encode_json(body), status, media_type="application/json")


def _error(error: BatonError, headers: Any = None) -> Response:
    return Response(error_json(error), error.http_status, headers, "application/json")
