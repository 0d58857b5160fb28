"""One real cluster at a time: `baton serve` over a real model, and what the tests ask of it."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx

from tests.baton_process import Baton, free_port, until

STOP_S = 20.0  # from a signal to the end of every process
SETTLE_S = 1.0  # for pages and slots of a client that left
BEAT_S = 0.25  # a worker's load is at most so old


class Cluster(Baton):
    """A `baton serve` with the tiny model.

    Attributes:
        model: what clients call it.
    """

    def __init__(
        self, home: Path, model_dir: Path, compile_cache: Path, *flags: str, module: str | None = None
    ) -> None:
        port = free_port()
        self.model = model_dir.name
        self.started_at = time.monotonic()
        common = ["--model", str(model_dir), "--port", str(port), "--compile_cache", str(compile_cache)]
        command = [module] if module else ["deploy.cli", "serve", "--verbose"]
        super().__init__(home, port, "-m", *command, *common, *flags)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def body(self, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "temperature": 0, "max_tokens": 16, **fields}

    def complete(self, **fields: Any) -> Any:
        """A completion, not streamed."""
        reply = httpx.post(f"{self.url}/v1/completions", json=self.body(**fields), timeout=120)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def _metrics_text(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            return response.read().decode()

    def num_disconnects(self) -> float:
        """Clients that left before their answer was complete."""
        return self._sum("client_disconnects_total")

    def num_retries(self) -> float:
        """Attempts beyond the first of a stream."""
        return self._sum("retries_total")

    def _sum(self, counter: str) -> float:
        values = re.findall(rf"^baton_{counter}(?:{{.*}})? (\S+)$", self._metrics_text(), re.MULTILINE)
        return sum(map(float, values))

    def num_placed(self, *, local: bool) -> float:
        """Attempts whose prompt the decode worker itself read (local), or a prefill worker."""
        return sum(count for prefill, count in self._placements() if (prefill == "local") is local)

    def num_placed_at(self, prefill_worker: str) -> float:
        """Attempts whose prompt this prefill worker read."""
        return sum(count for prefill, count in self._placements() if prefill == prefill_worker)

    def _placements(self) -> list[tuple[str, float]]:
        pattern = r'^baton_placements_total{decode="[^"]*",prefill="([^"]*)"} (\S+)$'
        found = re.findall(pattern, self._metrics_text(), re.MULTILINE)
        return [(prefill, float(value)) for prefill, value in found]

    def transfer_bytes(self) -> float:
        """KV that decode workers received and verified, as they said last."""
        return self._sum("transfer_bytes_total")

    def metrics(self) -> dict[str, dict[str, float]]:
        """Worker -> name of a gauge, without its prefix -> value."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for name, worker, value in re.findall(
            r'^baton_(\w+){role="\w+",worker="([\w-]+)"} (\S+)$', self._metrics_text(), re.MULTILINE
        ):
            found[worker][name] = float(value)
        return dict(found)

    def at_rest(self, num_pages: int) -> bool:
        """No worker holds a page, a slot or a request."""
        return all(
            worker["num_requests_running"] == worker["num_requests_waiting"] == 0 and worker["free_pages"] == num_pages
            for worker in self.metrics().values()
        )

    def until_at_rest(self, num_pages: int, seconds: float = SETTLE_S + BEAT_S) -> float:
        """Wait for it; returns how long it took."""
        begin = time.monotonic()
        while not self.at_rest(num_pages):
            assert time.monotonic() - begin < seconds, self.metrics()
            time.sleep(0.05)
        return time.monotonic() - begin

    def member(self, worker_id: str) -> Any:
        return next(m for m in self.status()["members"] if m["worker_id"] == worker_id)

    def until_life(self, worker_id: str, incarnation: int) -> None:
        """Wait until that life of the worker serves."""
        line = f"{worker_id} (incarnation {incarnation}) is ready"
        until(lambda: line in self.log.read_text(), 120)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)


class Streaming:
    """A long greedy stream that is read in a thread; it has begun once this returns, but for `wait=False`.

    Attributes:
        events: what came so far.
    """

    def __init__(self, cluster: Cluster, max_tokens: int = 900, *, wait: bool = True, **fields: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self._failure: Exception | None = None
        asked = {"prompt": "The lazy dog", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._body = cluster.body(**asked, **fields)
        self._url = f"{cluster.url}/v1/completions"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        if wait:
            until(lambda: len(self.events) > 3 or not self._thread.is_alive(), 60)

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=200) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self.events.append(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self._failure = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def texts(self) -> list[str]:
        """All of each choice, once all have ended as they should."""
        self._thread.join(200)
        assert not self.running and self._failure is None, self._failure
        assert "error" not in self.events[-1], self.events[-1]
        texts: dict[int, str] = defaultdict(str)
        reasons: dict[int, str] = {}
        for event in self.events:
            choice = event["choices"][0]
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"] is not None:
                reasons[choice["index"]] = choice["finish_reason"]
        assert reasons == dict.fromkeys(texts, "length")
        return [texts[index] for index in sorted(texts)]

    def text(self) -> str:
        """The only choice's."""
        (text,) = self.texts()
        return text
