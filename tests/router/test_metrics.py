"""The exposition against the catalogue, and what only exact numbers show."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine_core.messages import Distribution, LinkStats, WorkerStats
from engine_core.types import Role
from engine_core.worker_stats import STAGE_BOUNDS
from router.metric_catalogue import AGGREGATES, SPECS, Kind
from router.metrics import Histogram
from tests.fakes import FakeWorker, fleet_view
from tests.router.conftest import Cluster, run_cluster

ONE = Distribution([1, *[0] * len(STAGE_BOUNDS)], 0.0005)


def stats(**changes) -> WorkerStats:
    fields = dict.fromkeys(WorkerStats.__struct_fields__, 0)
    fields |= dict.fromkeys(("queue", "prefill", "transfer", "decode"), ONE)
    return WorkerStats(**{**fields, "links": {}, "refused": {}, **changes})


async def exposed(cluster: Cluster) -> dict[str, object]:
    text = (await cluster.http.get("/metrics")).text
    families = list(text_string_to_metric_families(text))
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for family in families:
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in seen, f"{key} twice: Prometheus refuses the whole scrape"
            seen.add(key)
    return {family.name: family for family in families}


def value(families: dict[str, object], name: str, sample: str = "", **labels: str) -> float:
    found = [s.value for s in families[name].samples if s.name == (sample or s.name) and s.labels == labels]
    assert len(found) == 1, families[name].samples
    return found[0]


async def heard(cluster: Cluster, worker: FakeWorker, message: WorkerStats) -> None:
    worker._server.tell(message)
    await cluster.until(lambda: any(w.stats == message for w in cluster.service.registry.workers.values()))


async def test_the_exposition_is_the_catalogue(cluster: Cluster) -> None:
    prefill = cluster.prefill[0].info.address
    links = {f"{prefill.host}:{prefill.kv_port}": LinkStats(1, 0, 4096, 0.5)}
    await heard(cluster, cluster.decode[0], stats(links=links))
    await cluster.client.completions.create(model="demo", prompt="Once", temperature=0)
    cluster.gateway.describe_fleet(fleet_view([worker.info for worker in cluster.prefill + cluster.decode]))
    families = await exposed(cluster)
    ours = {name: family for name, family in families.items() if name.startswith("baton_")}
    assert ours.keys() == {spec.name for spec in SPECS}
    for spec in SPECS:
        family = families[spec.name]
        assert (family.type, family.documentation) == (str(spec.kind), spec.help)
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels <= set(spec.labels)
        assert spec.name.rsplit("_", 1)[-1] in {"seconds", "bytes", "ratio", "info", "tokens"} or spec.kind is not (
            Kind.HISTOGRAM
        )
    assert {s.name for s in families["process_cpu_seconds"].samples} == {"process_cpu_seconds_total"}


async def test_what_the_fleet_says(cluster: Cluster) -> None:
    assert "baton_fleet_workers" not in await exposed(cluster), "nothing was said yet"
    cluster.gateway.describe_fleet(fleet_view([worker.info for worker in cluster.prefill + cluster.decode]))
    families = await exposed(cluster)
    assert value(families, "baton_fleet_wanted_workers", role="decode") == 2
    assert value(families, "baton_fleet_workers", role="decode", state="ready") == 1
    assert value(families, "baton_fleet_workers", role="decode", state="pending") == 0
    assert value(families, "baton_autoscale_target_workers", role="prefill") == 1
    assert value(families, "baton_autoscale_changes", role="decode", direction="up", cause="forecast") == 1


async def test_other_tools_names(cluster: Cluster, model_dir: Path, answer_ids: list[int]) -> None:
    await cluster.client.completions.create(model="demo", prompt="Once", temperature=0)
    families = await exposed(cluster)
    expected = AGGREGATES.keys() | {spec.alias for spec in SPECS if spec.alias}
    assert {name for name in families if name.startswith("vllm:")} == expected
    assert value(families, "vllm:request_success", finish_reason="length", model_name="demo") == 1
    count = value(
        families, "vllm:time_to_first_token_seconds", "vllm:time_to_first_token_seconds_count", model_name="demo"
    )
    assert count == 1
    cluster.decode[0].beat(type(cluster.decode[0].load)(3, 2, 0, 25, False, 0))
    await cluster.until(lambda: any(w.load and w.load.free_pages == 25 for w in cluster.service.registry.decode))
    families = await exposed(cluster)
    assert value(families, "vllm:kv_cache_usage_perc", model_name="demo") == 0.75
    assert value(families, "vllm:num_requests_waiting", model_name="demo") == 2
    async with run_cluster(model_dir, answer_ids, metric_aliases=False) as plain:
        assert not [name for name in await exposed(plain) if name.startswith("vllm:")]


async def test_links_are_named_by_worker(cluster: Cluster) -> None:
    prefill = cluster.prefill[0].info.address
    links = {f"{prefill.host}:{prefill.kv_port}": LinkStats(3, 1, 4096, 0.5), "gone:1": LinkStats(1, 0, 1, 1.0)}
    await heard(cluster, cluster.decode[0], stats(links=links, memory_used_bytes=7))
    families = await exposed(cluster)
    pair = {"prefill": "prefill-0", "decode": "decode-0"}
    assert value(families, "baton_transfer_bytes", **pair) == 4096
    assert value(families, "baton_transfer_failures", **pair) == 1
    assert value(families, "baton_transfers", prefill="gone:1", decode="decode-0") == 1
    worker = {"worker": "decode-0", "role": "decode"}
    assert value(families, "baton_device_memory_used_bytes", **worker) == 7
    assert value(families, "baton_queue_seconds", "baton_queue_seconds_count", **worker) == 1
    assert value(families, "baton_queue_seconds", "baton_queue_seconds_bucket", le="0.001", **worker) == 1


async def test_a_life_that_still_drains_is_not_told_about(cluster: Cluster) -> None:
    stream = await cluster.client.completions.create(model="demo", prompt="Once", max_tokens=400, stream=True)
    await anext(aiter(stream))
    later = await FakeWorker(Role.DECODE, "decode-0", cluster.decode[0].answer, incarnation=2).start()
    try:
        cluster.gateway.follow([cluster.prefill[0].info, later.info])
        families = await exposed(cluster)
        assert value(families, "baton_worker_incarnation", worker="decode-0", role="decode") == 2
    finally:
        await stream.close()
        cluster.follow_all()
        await later.stop()


@pytest.mark.parametrize(("objectives", "within"), [({}, 1), ({"slo_ttft_s": 1e-6}, 0), ({"slo_itl_s": 1e-6}, 0)])
async def test_goodput(model_dir: Path, answer_ids: list[int], objectives: dict, within: int) -> None:
    async with run_cluster(model_dir, answer_ids, **objectives) as cluster:
        await cluster.client.completions.create(model="demo", prompt="Once", temperature=0)
        families = await exposed(cluster)
        assert value(families, "baton_choices_within_slo") == within
        assert value(families, "baton_choices", finish_reason="length") == 1
        assert value(families, "baton_placements", prefill="prefill-0", decode="decode-0") == 1


async def test_how_choices_end(cluster: Cluster, answer_ids: list[int]) -> None:
    text = (
        (await cluster.client.completions.create(model="demo", prompt="a", max_tokens=30, temperature=0))
        .choices[0]
        .text
    )
    await cluster.client.completions.create(model="demo", prompt="a", max_tokens=400, temperature=0, stop=[text[5:9]])
    stream = await cluster.client.completions.create(model="demo", prompt="a", max_tokens=400, stream=True)
    await anext(aiter(stream))
    await stream.close()
    cluster.decode[0].fail, cluster.decode[0].fail_retryable = 1, False
    with pytest.raises(Exception, match="made to fail"):
        await cluster.client.completions.create(model="demo", prompt="a", max_tokens=4)
    await cluster.until(lambda: not cluster.service._streams)
    families = await exposed(cluster)
    ends = {s.labels["finish_reason"]: s.value for s in families["baton_choices"].samples if s.name.endswith("_total")}
    assert ends == {"stop": 1, "length": 1, "cancelled": 1, "error": 1}


def test_values_are_counted_in_their_buckets_whenever_somebody_looks() -> None:
    histogram = Histogram("baton_placement_term_seconds")
    values = [0.0, *histogram.bounds, 1e-5, 0.3, 1e9]
    for value in values[:5]:
        histogram.observe(value)
    histogram.fold()
    for value in values[5:]:
        histogram.observe(value)
    bounds = [*histogram.bounds, math.inf]
    assert histogram.buckets == [
        (label, sum(value <= bound for value in values))
        for (label, _), bound in zip(histogram.buckets, bounds, strict=True)
    ]
    assert histogram.sum == pytest.approx(sum(values))
    assert sum(histogram.counts) == len(values)


async def test_what_was_noted_is_counted_at_every_beat(cluster: Cluster) -> None:
    metrics = cluster.service.metrics
    await cluster.client.completions.create(model="demo", prompt="Once upon a time", temperature=0)
    noted = [metrics.itl._noted, metrics.terms._noted, metrics.decision._noted]
    await cluster.until(lambda: not any(noted))
    assert sum(metrics.decision.counts) == 1


async def test_the_terms_of_chosen_pairs_are_counted(cluster: Cluster) -> None:
    name = "baton_placement_term_seconds"
    for _ in range(2):
        await cluster.client.completions.create(model="demo", prompt="Once upon a time", temperature=0)
    families = await exposed(cluster)
    terms = {sample.labels["term"] for sample in families[name].samples}
    assert terms == {"queue", "prefill", "transfer", "itl", "crowding", "followers", "affinity", "fetch"}
    for term in terms:
        assert value(families, name, f"{name}_count", term=term) == 2
    decisions = [d for each in cluster.service.decisions._by_request.values() for d in each]
    chosen_s = sum(decision.chosen.terms.prefill_s for decision in decisions)
    assert value(families, name, f"{name}_sum", term="prefill") == pytest.approx(chosen_s)
