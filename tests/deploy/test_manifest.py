"""Overlays as they are rendered are fine; what is wrong in one is told with its line before it is applied."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deploy import cli
from deploy.manifest import Manifest, has_secret
from engine_core.errors import ConfigError
from tests.deploy.kustomize import render
from tests.deploy.test_cluster_file import ROOT, dense_model, line, local

NAMES = sorted(path.name for path in (ROOT / "deploy/k8s/overlays").iterdir())
SECRETS = {("baton", "baton-secret"), ("baton", "baton-ray-token")}


def exists(namespace: str, name: str) -> bool | None:
    return (namespace, name) in SECRETS


@pytest.fixture
def rendered(tmp_path: Path) -> Callable[..., Path]:
    """Writes an overlay as kubectl would render it, with changes of its text."""

    def write(overlay: str, *changes: tuple[str, str]) -> Path:
        text = yaml.safe_dump_all(render(ROOT / "deploy/k8s/overlays" / overlay), sort_keys=False)
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / f"{overlay}.yaml"
        path.write_text(text)
        return path

    return write


def problems(path: Path) -> list[str]:
    return [f"{problem.line}: {problem.text}" for problem in Manifest(path, local, exists).check()]


@pytest.mark.parametrize("overlay", NAMES)
def test_every_overlay_is_fine(rendered: Callable[..., Path], overlay: str) -> None:
    assert problems(rendered(overlay)) == []


def test_images_of_different_versions(rendered: Callable[..., Path]) -> None:
    path = rendered(
        "v6e", ("image: baton:cpu", "image: r/baton:0.2-cpu"), ("image: baton:tpu", "image: r/baton:0.2-tpu")
    )
    assert problems(path) == []
    path.write_text(path.read_text().replace("0.2-tpu", "0.1-tpu"))
    where = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "0.1-tpu" in text]
    assert problems(path) == [
        f"{number}: the head runs r/baton:0.2-cpu, these pods r/baton:0.1-tpu: not of one version" for number in where
    ]


def test_a_missing_secret_is_named_once(rendered: Callable[..., Path]) -> None:
    path = rendered("v6e", ("secretName: baton-secret", "secretName: other"))
    assert problems(path) == [f"{line(path, 'secretName: other')}: there is no secret other in the namespace baton"]
    manifest = Manifest(path, local, lambda namespace, name: None)
    assert manifest.check() == []
    assert [note for note in manifest.notes if "secret" in note] == [
        f"not known, as no cluster answers: whether there is a secret {name}" for name in ("baton-ray-token", "other")
    ]


def test_ray_without_a_token(rendered: Callable[..., Path]) -> None:
    path = rendered("v6e", ("mode: token", "mode: disabled"))
    assert problems(path) == [
        f"{line(path, 'authOptions')}: Ray's processes do not authenticate: authOptions.mode is not token"
    ]


@pytest.mark.parametrize(
    ("overlay", "old", "new", "at", "message"),
    [
        ("v6e", "name: dashboard", "name: board", "ports:", "none is dashboard: without it KubeRay never serves"),
        ("v6e", "name: serve", "name: serving", "ports:", "none is serve: without it KubeRay never serves"),
        ("v6e", "-host: 0.0.0.0", "-host: localhost", "dashboard-host", "dashboard-host is localhost, where KubeRay's"),
        ("v6e", """'''{"baton-decode": 1}'''""", r"""'"{\"baton-decode\": 1}"'""", "resources:", "is not JSON"),
        ("v6e", "gke-tpu-topology: 2x4", "gke-tpu-topology: 4x4", "4x4", "4x4 is not that of 1 hosts with 8 chips"),
        ("v6e", "gke-tpu-accelerator: tpu-v6e-slice", "gke-tpu-accelerator: gpu", "gpu", "gpu is not a TPU known here"),
        ("v6e", "tpu: '8'", "tpu: '4'", "tpu: '4'", "this pod has 4 TPU chips, a worker needs more (engine.tp 8"),
        ("v6e", "decode = 2", "decode = 3", "replicas", "replicas is 2, the configuration wants 3 of baton-decode"),
        ("v6e", "baton-decode", "baton-other", "workerGroupSpecs", "no group offers baton-decode"),
        ("v6e", "tp = 8", "tp = eight", "baton.toml", "baton.toml"),
        (
            "v6e",
            "/etc/baton/baton.toml",
            "/etc/baton/other.toml",
            "serveConfigV2",
            "no ConfigMap of this file",
        ),
        (
            "v6e-autoscale",
            "max_decode = 4",
            "max_decode = 5",
            "maxReplicas",
            "is 4, the configuration wants 5",
        ),
        ("v6e-multihost", "numOfHosts: 4", "numOfHosts: 2", "numOfHosts: 2", "numOfHosts is 2, a worker spans 4"),
        ("tpu7x-multihost", "topology: 2x2x4", "topology: 4x2x2", "4x2x2", "4x2x2 is not 2x2x4 of the configuration"),
    ],
)
def test_what_the_configuration_does_not_fit(
    rendered: Callable[..., Path], overlay: str, old: str, new: str, at: str, message: str
) -> None:
    path = rendered(overlay, (old, new))
    found = [one for one in problems(path) if message in one]
    assert found, problems(path)
    assert at in path.read_text().splitlines()[int(found[0].partition(":")[0]) - 1]


def test_a_model_that_does_not_fit(rendered: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16384, "num_hidden_layers": 120, "intermediate_size": 53248, "num_attention_heads": 128}
    model = dense_model(tmp_path / "huge", num_key_value_heads=8, **sizes)
    path = rendered("v6e", ("Qwen/Qwen3-32B", str(model)))
    found = problems(path)
    assert len(found) == 2 and all("GiB of weights; 8 chips of v6e may use" in text for text in found)
    assert found[0].startswith(f"{line(path, 'tpu-v6e-slice')}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n---\n- 2\n", ":3: it must be a mapping"),
        ("kind: X\n", ":1: it has 0 objects of the kind RayService"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Manifest(tmp_path / "x.yaml", local, exists)


def test_a_form_that_the_api_server_would_not_take(rendered: Callable[..., Path]) -> None:
    path = rendered("v6e", ("google.com/tpu: '8'", "google.com/tpu: many"))
    assert problems(path)[0].startswith(
        f"{line(path, 'kind: RayService') - 1}: not the form of a RayService: ValueError"
    )


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that knows a single secret, and writes down what it is told to do."""
    program = tmp_path / "bin/kubectl"
    program.parent.mkdir()
    told = tmp_path / "told"
    program.write_text(
        f"""#!/bin/sh
case "$*" in
  *"get secret baton-secret"*) echo secret/baton-secret ;;
  *"get secret"*) echo 'Error from server (NotFound): secrets not found' >&2; exit 1 ;;
  *) echo "$@" >> {told} ;;
esac
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return told


def test_up_looks_secrets_up_and_applies_what_is_fine(
    rendered: Callable[..., Path], kubectl: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert has_secret("baton", "baton-secret") is True and has_secret("baton", "baton-ray-token") is False
    path = rendered("kind-cpu")
    assert cli.main(["up", str(path)]) == 2
    wrong = (
        f"{path}:{line(path, 'secretName: baton-ray-token')}: there is no secret baton-ray-token in the namespace baton"
    )
    assert wrong in capfd.readouterr().err and not kubectl.exists()
    path.write_text(path.read_text().replace("baton-ray-token", "baton-secret"))
    assert cli.main(["up", str(path), "--check"]) == 0 and not kubectl.exists()
    assert cli.main(["up", str(path)]) == 0 and cli.main(["down", str(path)]) == 0
    assert kubectl.read_text().splitlines() == [f"apply --filename {path}", f"delete --filename {path}"]


def test_a_cluster_that_does_not_answer(kubectl: Path) -> None:
    program = kubectl.parent / "bin/kubectl"
    program.write_text("#!/bin/sh\necho 'Unable to connect to the server' >&2; exit 1\n")
    assert has_secret("baton", "baton-secret") is None
