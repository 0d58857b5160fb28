"""deploy/k8s and deploy/docker against Kubernetes' and KubeRay's schemas, and against Baton's own code."""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy import cli
from deploy.config import DEVICES_PER_CHIP, AutoscaleMode
from deploy.ray_app import AppArgs
from deploy.wait_idle import wait_idle
from engine_core.types import Role
from router.config import GatewayConfig
from tests.deploy.kustomize import render

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy/k8s"
SHARED = next((path for path in (ROOT / "shared", ROOT.parent / "shared") if path.is_dir()), ROOT / "shared")
CRDS = SHARED / "data/kuberay_crds"
NAMES = ("kind-cpu", "v6e", "v6e-spot", "v6e-autoscale", "v6e-multihost", "tpu7x-multihost")
OVERLAYS = ["base", *(f"overlays/{name}" for name in NAMES)]
VERSION = "1.34"
CUSTOM = {"RayService", "PodMonitor"}  # no schema in Kubernetes itself

pytestmark = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture
def objects(overlay: str) -> list[dict[str, Any]]:
    return render(K8S / overlay)


@pytest.fixture
def cluster(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return next(o for o in objects if o["kind"] == "RayService")["spec"]["rayClusterConfig"]


@pytest.fixture
def config(objects: list[dict[str, Any]], tmp_path: Path):
    data = next(o for o in objects if o["kind"] == "ConfigMap")["data"]
    (tmp_path / "baton.toml").write_text(data["baton.toml"])
    return importlib.import_module("deploy.launch").read_config((), tmp_path / "baton.toml")


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def templates(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


def test_kubectl_renders_the_same(overlay: str, objects: list[dict[str, Any]]) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(K8S / overlay)], capture_output=True, text=True)
    if "unknown field" in done.stderr:
        pytest.skip("this kubectl's kustomize is too old")
    assert done.returncode == 0, done.stderr

    def by_name(found: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
        return {(o["kind"], o["metadata"]["name"]): o for o in found}

    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(objects)


def test_kubernetes_own_schemas(objects: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for one in objects:
        if one["kind"] not in CUSTOM:
            validate.validate(one, VERSION, strict=True)
        else:
            for template in templates(one["spec"]["rayClusterConfig"]) if one["kind"] == "RayService" else ():
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
                validate.validate(pod, VERSION, strict=True)


def test_kuberays_schema(objects: list[dict[str, Any]]) -> None:
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}")
    schema = ray_service_schema()
    service = next(o for o in objects if o["kind"] == "RayService")
    jsonschema.validate(service, schema)
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["nonsense"] = 1
    with pytest.raises(jsonschema.ValidationError, match="nonsense"):
        jsonschema.validate(service, schema)


@functools.cache
def ray_service_schema() -> Any:
    crd = yaml.load((CRDS / "ray.io_rayservices.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """The same without tolerance: a field that is not in it would be dropped by the API server without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(item) for key, item in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not is_open:
        made["additionalProperties"] = False
    return made


def test_the_application_is_ours(objects: list[dict[str, Any]], config: Any) -> None:
    service = next(o for o in objects if o["kind"] == "RayService")
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert served["proxy_location"] == "Disabled"
    app = served["applications"][0]
    module, _, name = app["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    args = importlib.import_module("msgspec").convert(app["args"], AppArgs)
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    schema.model_validate(served) if hasattr(schema, "model_validate") else schema.parse_obj(served)
    for template in templates(service["spec"]["rayClusterConfig"]):
        container = template["spec"]["containers"][0]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts[str(Path(args.config_file).parent)]["configMap"]["name"] == "baton-config"
        for path in (args.secret_file, args.api_keys_file):
            assert mounts[str(Path(path).parent)]["secret"]["secretName"] == "baton-secret"
    assert config.fleet.host == "node" and config.fleet.pool_resources


def test_pools_are_what_the_configuration_wants(cluster: dict[str, Any], config: Any) -> None:
    wanted = {"gateway": config.fleet.gateways} | {str(role): config.fleet.count(role) for role in Role}
    found = groups(cluster)
    assert found.keys() == wanted.keys()
    acts = config.autoscale.mode is AutoscaleMode.ACT
    assert cluster.get("enableInTreeAutoscaling", False) is acts, "Ray's autoscaler where Baton's asks for nodes"
    for name, group in found.items():
        least = most = wanted[name]
        if name != "gateway" and config.autoscale.mode is AutoscaleMode.ACT:
            least, most = (getattr(config.autoscale, f"{bound}_{name}") for bound in ("min", "max"))
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (wanted[name], least, most)
        offered = group["rayStartParams"]["resources"]
        assert json.loads(offered.strip("'")) == {f"baton-{name}": 1}, "as KubeRay reads it"
        assert group["template"]["metadata"]["labels"]["baton.dev/component"] == name
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        chips = int(limits.get("google.com/tpu", 0))
        if name == "gateway":
            assert not chips
            continue
        shape = config.shape(Role(name))
        per_chip = DEVICES_PER_CHIP.get(shape.accelerator, 1)
        assert group["numOfHosts"] == shape.hosts and chips * shape.hosts == shape.tpus
        assert shape.engine.tp == max(chips * shape.hosts * per_chip, 1)
        if chips:
            selector = group["template"]["spec"]["nodeSelector"]
            topology = selector["cloud.google.com/gke-tpu-topology"]
            assert math.prod(map(int, topology.split("x"))) == chips * group["numOfHosts"]
            assert shape.hosts == 1 or topology == shape.topology
            assert shape.accelerator.removeprefix("tpu") in selector["cloud.google.com/gke-tpu-accelerator"]


def test_rays_autoscaler_knows_what_the_pods_offer(objects: list[dict[str, Any]], config: Any) -> None:
    """As the container beside the head reads the cluster on KubeRay; its resources make Ray start the right pods."""
    derive = importlib.import_module("ray.autoscaler._private.kuberay.autoscaling_config")
    service = next(o for o in objects if o["kind"] == "RayService")
    cluster = {"metadata": service["metadata"], "spec": service["spec"]["rayClusterConfig"]}
    kinds = derive._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    for role in Role:
        shape = config.shape(role)
        resources = kinds[role]["resources"]
        assert resources[f"baton-{role}"] == 1 and resources["CPU"] == 0
        assert resources.get("TPU", 0) == shape.tpus / shape.hosts
        heads = [name for name in resources if name.endswith("-head")]
        assert len(heads) == (1 if shape.tpus else 0), "what a slice of several hosts is reserved by"


def test_kuberays_operator_finds_the_head(objects: list[dict[str, Any]], cluster: dict[str, Any]) -> None:
    """It makes the head's service of named ports, asks for these two, and comes from another namespace."""
    head = cluster["headGroupSpec"]
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"gcs": 6379, "dashboard": 8265, "client": 10001, "serve": 8000}
    assert head["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    policy = next(o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "baton-head")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= head["template"]["metadata"]["labels"].items()
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [ports["dashboard"]]


def test_draining_fits_into_the_grace(cluster: dict[str, Any], config: Any) -> None:
    for template in templates(cluster):
        assert template["spec"]["terminationGracePeriodSeconds"] > config.fleet.drain_timeout_s + 5
    gateway = groups(cluster)["gateway"]["template"]["spec"]
    command = gateway["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", wait_idle.__module__]
    flags = dict(zip(command[3::2], command[4::2], strict=True))
    assert flags.keys() == {"--url", "--settle", "--timeout"}
    assert float(flags["--settle"]) + config.fleet.drain_timeout_s <= float(flags["--timeout"])
    assert float(flags["--timeout"]) < gateway["terminationGracePeriodSeconds"]


def test_ports_and_paths_are_the_gateways(objects: list[dict[str, Any]], cluster: dict[str, Any], config: Any) -> None:
    container = groups(cluster)["gateway"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": config.gateway.port}
    service = next(o for o in objects if o["kind"] == "Service")
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    monitor = next(o for o in objects if o["kind"] == "PodMonitor")["spec"]
    assert monitor["podMetricsEndpoints"][0]["port"] == "http"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == "http"
    open_ports = [
        port["port"]
        for policy in objects
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"]["ingress"]
        if "from" not in rule
        for port in rule["ports"]
    ]
    assert open_ports == [config.gateway.port], "only the gateway's port is open to everyone"
    labels = groups(cluster)["gateway"]["template"]["metadata"]["labels"]
    for selector in (service["spec"]["selector"], monitor["selector"]["matchLabels"]):
        assert selector.items() <= labels.items()


def test_pods_are_restricted_and_ray_authenticates(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token", "secretName": "baton-ray-token"}
    assert cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert cluster["rayVersion"] == importlib.import_module("ray").__version__
    for template in templates(cluster):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        container = template["spec"]["containers"][0]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        names = [variable["name"] for variable in container["env"]]
        assert "RAY_gcs_rpc_server_reconnect_timeout_s" in names
        assert not [name for name in names if "SECRET" in name.upper() or "KEY" in name.upper()]


class TestOnce:
    """What does not depend on the overlay runs for the first one only."""

    @pytest.fixture(autouse=True)
    def first(self, overlay: str) -> None:
        if overlay != OVERLAYS[0]:
            pytest.skip("the same for every overlay")

    def test_examples_point_at_what_exists(self, objects: list[dict[str, Any]]) -> None:
        route = yaml.safe_load((K8S / "examples/httproute.yaml").read_text())
        backend = route["spec"]["rules"][0]["backendRefs"][0]
        service = next(o for o in objects if o["kind"] == "Service")
        assert (backend["name"], backend["port"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
        assert route["metadata"]["namespace"] == service["metadata"]["namespace"]
        pool = yaml.safe_load((K8S / "examples/inferencepool.yaml").read_text())["spec"]
        assert pool["selector"]["matchLabels"] == service["spec"]["selector"]
        assert pool["targetPorts"] == [{"number": GatewayConfig().port}]

    @pytest.mark.parametrize("name", ["cpu", "tpu"])
    def test_dockerfiles(self, name: str) -> None:
        text = (ROOT / f"deploy/docker/Dockerfile.{name}").read_text()
        base = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
        assert len(base) == 1 and re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base[0]), "a pinned base"
        command = yaml.safe_load(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[0])
        assert command[0] == "baton"
        known, unknown = cli.build_parser().parse_known_args(command[1:])
        launch = importlib.import_module("deploy.launch")
        config = launch.read_config([*unknown, "--host", known.host, *(["--tp", known.tp] if known.tp else [])], None)
        assert config.gateway.host == "0.0.0.0"
        for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
            for path in shlex.split(source):
                assert path.startswith("dist/") or (ROOT / path).exists()

    def test_waiting_for_idle(self) -> None:
        now = [0.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds

        answers = iter(["baton_streams_running 2.0\n", "x 1\n", "baton_streams_running 0.0\n"])
        assert wait_idle(lambda: next(answers), lambda: now[0], sleep, 60) and now[0] == 1.0
        assert not wait_idle(lambda: "baton_streams_running 2.0\n", lambda: now[0], sleep, 10) and now[0] >= 10

        def refuse() -> str:
            raise ConnectionRefusedError

        assert wait_idle(refuse, lambda: now[0], sleep, 0)
