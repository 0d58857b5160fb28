"""The dashboard's state over HTTP, and the page in a real browser against real workers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_core.messages import Load
from router.dashboard import PAGES
from router.decision import Terms
from router.fleet_view import AutoscaleView, FleetView, MemberView, ScaleChange, ScaleDecision
from router.history import bucket_quantile
from tests.chromium import Chromium
from tests.live_baton import LiveBaton
from tests.router.conftest import Cluster, run_cluster

KEY = "sk-dash"
CONTRAST = 4.5  # WCAG AA for text
FLEET = FleetView(
    {"prefill": 1, "decode": 3},
    (MemberView("d", "decode", 1, "ready", "", 7), MemberView("new", "decode", 2, "starting", "compiling 3/9", 8)),
    ("new (incarnation 2) is starting",),
    AutoscaleView(
        "act",
        "",
        {"prefill": 1, "decode": 3},
        (ScaleChange("decode", "up", "forecast", 1),),
        (ScaleDecision(1.7e9, True, {"decode": 2}, {"decode": 3}, "up", ("the floor is 3", "there are 2")),),
        {"decode": 3},
    ),
)


async def test_pages_are_open_and_the_state_is_not(model_dir: Path, answer_ids: list[int]) -> None:
    async with run_cluster(model_dir, answer_ids, api_keys=(KEY,)) as cluster:
        for path, (_, kind) in PAGES.items():
            reply = await cluster.http.get(path)
            assert (reply.status_code, reply.headers["content-type"]) == (200, kind)
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            assert "http" not in reply.text.replace("http://www.w3.org/2000/svg", ""), "loads from elsewhere"
        assert (await cluster.http.get("/dashboard/state")).status_code == 401
        reply = await cluster.http.get("/dashboard/state", headers={"authorization": f"Bearer {KEY}"})
        assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-store")
        assert KEY not in reply.text


async def test_state(cluster: Cluster) -> None:
    await cluster.client.completions.create(model="demo", prompt="Once upon", max_tokens=5, temperature=0)
    cluster.decode[0].beat(Load(1, 2, 3, 25, False, 0, 4))
    await cluster.until(lambda: any(w.load and w.load.waiting == 2 for w in cluster.service.registry.decode))
    cluster.service.history.sample()
    cluster.service.fleet = FLEET
    state = (await cluster.http.get("/dashboard/state")).json()
    assert state["status"] == "ready"
    assert state["totals"]["choices"] == {"stop": 0, "length": 1, "cancelled": 0, "error": 0}
    assert (state["totals"]["generated_tokens"], state["totals"]["within_slo"]) == (5, 1)
    worker = next(w for w in state["workers"] if w["role"] == "decode")
    assert (worker["running"], worker["waiting"], worker["kv_usage"], worker["preemptions"]) == (1, 2, 0.75, 4)
    slow = state["slowest"][0]
    assert (slow["prefill"], slow["decode"], slow["reason"]) == ("prefill-0", "decode-0", "length")
    assert (slow["generated_tokens"], slow["attempts"]) == (5, 1)
    assert 0 < slow["ttft_s"] < slow["e2e_s"]
    assert slow["terms"].keys() == set(Terms.__struct_fields__)
    assert state["history"][-1]["tokens"] > 0
    assert state["fleet"]["members"][1]["progress"] == "compiling 3/9"
    assert state["fleet"]["autoscale"]["decisions"][0]["reasons"] == ["the floor is 3", "there are 2"]


async def test_the_slowest_come_first_and_those_without_a_token_first_of_all(cluster: Cluster) -> None:
    for step_s in (0.001, 0.2, 0.05):
        cluster.prefill[0].step_s = step_s
        await cluster.client.completions.create(model="demo", prompt="Once", max_tokens=2, temperature=0)
    cluster.prefill[0].fail, cluster.prefill[0].fail_retryable = 1, False
    cluster.decode[0].fail, cluster.decode[0].fail_retryable = 1, False
    with pytest.raises(Exception, match="made to fail"):
        await cluster.client.completions.create(model="demo", prompt="Once", max_tokens=2)
    slowest = (await cluster.http.get("/dashboard/state")).json()["slowest"]
    times = [entry["ttft_s"] for entry in slowest if entry["ttft_s"] is not None]
    assert times == sorted(times, reverse=True) and len(times) == 3
    assert [entry["reason"] for entry in slowest].count("error") == 1


def test_quantiles_of_buckets() -> None:
    assert bucket_quantile(0.5, (1, 2, 4), [0, 0, 0, 0]) is None
    assert bucket_quantile(0.5, (1, 2, 4), [0, 10, 0, 0]) == 1.5
    assert bucket_quantile(0.99, (1, 2, 4), [50, 50, 0, 0]) == pytest.approx(1.98)
    assert bucket_quantile(0.99, (1, 2, 4), [0, 0, 0, 3]) == 4
    assert bucket_quantile(1, (1, 2, 4), [3, 0, 0, 0]) == 1


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveBaton]:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed; `make system-packages` installs it where apt-get can")
    running = LiveBaton(tmp_path_factory.mktemp("model"), api_keys=(KEY,)).start()
    running.ask(12)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser(live: LiveBaton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(shutil.which("chromium") or "", tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


def state(live: LiveBaton) -> Any:
    return httpx.get(f"{live.url}/dashboard/state", headers=live.headers).json()


def table(name: str) -> str:
    return f"[...document.querySelectorAll('#{name} tbody tr')].map(r => [...r.cells].map(c => c.textContent.trim()))"


def tile(name: str) -> str:
    return f"""document.querySelector('[data-value="{name}"]')?.textContent"""


@pytest.mark.slow
class TestPage:
    """In order: each test goes on where the one before left the page."""

    def test_it_asks_for_the_key_and_takes_it_from_the_keyboard(self, browser: Chromium, live: LiveBaton) -> None:
        browser.size(1280, 900)
        browser.open(f"{live.url}/dashboard")
        browser.until("document.getElementById('key-form')?.hidden === false")
        assert browser.js("document.activeElement.id") == "key"
        browser.type("sk-wrong")
        browser.key("Enter")
        browser.until("document.getElementById('key-error').textContent !== ''")
        assert browser.js("document.getElementById('main').hidden") is True
        browser.type(KEY)
        browser.key("Enter")
        browser.until("document.getElementById('main').hidden === false")
        assert browser.js("document.getElementById('status').textContent") == "ready"

    def test_its_numbers_are_the_apis(self, browser: Chromium, live: LiveBaton) -> None:
        browser.until_equal(tile("ended"), lambda: f"{sum(state(live)['totals']['choices'].values()):,}")
        truth = state(live)
        assert browser.js(tile("generated")) == f"{truth['totals']['generated_tokens']:,}"
        assert browser.js(tile("errors")) == "0"
        rows = {row[0]: row for row in browser.js(table("workers"))}
        assert rows.keys() == {worker["worker"] for worker in truth["workers"]} == {"p", "d", "c"}
        for worker in truth["workers"]:
            row = rows[worker["worker"]]
            assert row[1:5] == [worker["role"], "ready", "1", "0"]
            assert row[5] == str(worker["slots"]) and row[9] == f"{worker['free_pages']} of {worker['pages']}"
        links = browser.js(table("links"))
        assert [row[0] for row in links] == ["p"]
        by_decode = {link["decode"]: link for link in truth["links"]}
        heads = browser.js("[...document.querySelectorAll('#links thead th')].map(c => c.textContent)")[1:]
        for decode, cell in zip(heads, links[0][1:], strict=True):
            assert f" in {by_decode[decode]['transfers']}," in cell and "iB" in cell
        slow = browser.js(table("slow"))
        assert [row[0] for row in slow] == [entry["request_id"] for entry in truth["slowest"]]
        assert {row[9] for row in slow} == {"p", "local"}
        browser.until("document.querySelectorAll('#charts svg path').length >= 4")

    def test_it_updates_by_itself(self, browser: Chromium, live: LiveBaton) -> None:
        before = browser.js(tile("ended"))
        live.ask(3)
        browser.until(f"{tile('ended')} !== '{before}'", 15)
        live.gateway.describe_fleet(FLEET)
        browser.until("document.querySelectorAll('#workers tbody tr').length === 4", 15)
        rows = {row[0]: row for row in browser.js(table("workers"))}
        assert rows["new"][2] == "starting: compiling 3/9"
        assert "1 prefill, 3 decode" in browser.js("document.getElementById('wanted').textContent")
        assert browser.js("document.querySelector('#events li').textContent") == FLEET.events[0]
        decided = browser.js(table("autoscale"))
        assert [row[1:] for row in decided] == [["2 decode", "3 decode", "yes", "the floor is 3; there are 2"]]
        said = browser.js("document.getElementById('autoscale-now').textContent")
        assert said.startswith("Mode act; it wants 1 pre") and said.endswith(
            "no more than 3 decode until `baton scale`."
        )

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 390])
    def test_it_is_readable(self, browser: Chromium, scheme: str, width: int, tmp_path: Path) -> None:
        browser.size(width, 900)
        browser.scheme(scheme)
        browser.until(f"innerWidth === {width}")
        assert browser.js("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        pairs = browser.js(
            "['body','#updated','dt','dd','#workers td','#workers thead th','.good','figcaption','#wanted'].map(s => {"
            "const e = document.querySelector(s); let b = e, c;"
            "do { c = getComputedStyle(b).backgroundColor; b = b.parentElement; }"
            "while (b && c === 'rgba(0, 0, 0, 0)');"
            "return [s, getComputedStyle(e).color, c]; })"
        )
        for name, text, ground in pairs:
            assert contrast(text, ground) >= CONTRAST, f"{name}: {text} on {ground}"
        dark = luminance(browser.js("getComputedStyle(document.body).backgroundColor")) < 0.1
        assert dark is (scheme == "dark")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000

    def test_the_keyboard_reaches_everything(self, browser: Chromium) -> None:
        browser.size(1280, 900)
        browser.js("document.querySelector('.skip').focus()")
        reached = []
        for _ in range(5):
            browser.key("Tab")
            reached.append(browser.js("document.activeElement.className || document.activeElement.id"))
            outline = browser.js("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", f"no focus ring on {reached[-1]}"
        assert reached == ["theme", *["scroll"] * 4]
        browser.js("document.getElementById('theme').focus()")
        browser.key("Enter")
        assert browser.js("document.documentElement.dataset.theme") == "light"
        browser.key("Enter")
        browser.key("Enter")
        assert browser.js("document.getElementById('theme').textContent") == "Theme: system"

    def test_it_survives_a_restart_of_the_gateway(self, browser: Chromium, live: LiveBaton) -> None:
        live.stop_gateway()
        browser.until("document.getElementById('trouble').hidden === false", 15)
        assert browser.js("document.getElementById('status').textContent") == "not connected"
        assert len(browser.js(table("workers"))) == 4, "the last state stays"
        live.start_gateway()
        browser.until("document.getElementById('trouble').hidden === true", 20)
        live.ask(2)
        browser.until_equal(tile("ended"), lambda: f"{sum(state(live)['totals']['choices'].values()):,}")

    def test_nothing_went_wrong_in_the_page(self, browser: Chromium) -> None:
        expected = ("401", "ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET")
        assert [problem for problem in browser.problems if not any(code in problem for code in expected)] == []


def channels(color: str) -> list[float]:
    return [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(color)]
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
