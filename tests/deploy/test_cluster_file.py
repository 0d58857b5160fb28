"""The committed cluster files, and what is refused with which line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray._private.accelerators.tpu import TPUAcceleratorManager

from deploy import cli
from deploy.cluster_file import ClusterFile
from deploy.launch import read_config
from deploy.secret_files import write_secret
from engine_core.errors import CheckpointError
from engine_core.types import Role

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy/ray").glob("*.yaml"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working directory where everything that the files mount exists."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "deploy/ray", tmp_path / "deploy/ray")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/baton-0.1.0-py3-none-any.whl").touch()
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    for file in FILES:
        secrets = tmp_path / ".config/baton" / file.stem
        for name in ("secret", "ray-token"):
            write_secret(secrets / name)
        (secrets / "api-keys").write_text("# team A\nsk-one\n")
    return tmp_path


def local(model: str) -> Path | None:
    """The hub does not answer."""
    return Path(model) if Path(model).is_dir() else None


def problems(path: Path) -> list[str]:
    file = ClusterFile(path, local)
    return [f"{problem.line}: {problem.text}" for problem in file.check()]


def dense_model(directory: Path, **sizes: int) -> Path:
    """A config.json of that shape."""
    directory.mkdir()
    golden = json.loads((ROOT / "tests/golden/qwen3/config.json").read_text())
    config = {key: value for key, value in golden.items() if key != "layer_types"}
    config |= {"head_dim": 128, "max_position_embeddings": 32768} | sizes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def changed(home: Path, name: str, *changes: tuple[str, str]) -> Path:
    path = home / "deploy/ray" / f"{name}.yaml"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def line(path: Path, text: str) -> int:
    return next(i for i, found in enumerate(path.read_text().splitlines(), 1) if text in found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_committed_file_is_fine(home: Path, file: Path) -> None:
    assert problems(home / "deploy/ray" / file.name) == []
    config = read_config((), ROOT / "deploy/ray" / f"{file.stem.removesuffix('-spot')}.toml")
    for shape in map(config.shape, Role):
        assert shape.hosts == 1 or TPUAcceleratorManager.is_valid_tpu_accelerator_topology(
            shape.accelerator, shape.topology
        ), "Ray knows the slice"


def test_missing_secrets_are_named_with_their_lines(home: Path) -> None:
    path = home / "deploy/ray/v6e-1p1d.yaml"
    (home / ".config/baton/v6e-1p1d/secret").unlink()
    (home / ".config/baton/v6e-1p1d/api-keys").write_text("# none\n")
    found = problems(path)
    assert found[0].startswith(f"{line(path, '~/baton/secret:')}: ~/.config/baton/v6e-1p1d/secret, to be mounted")
    assert found[1].startswith(f"{line(path, '~/baton/api-keys:')}: ") and "holds no key" in found[1]
    assert len(found) == 2


def test_a_short_secret_is_refused(home: Path) -> None:
    (home / ".config/baton/v6e-1p1d/secret").write_text("short")
    assert "at least 16 are needed" in problems(home / "deploy/ray/v6e-1p1d.yaml")[0]


def test_rays_own_schema(home: Path) -> None:
    path = changed(home, "v6e-1p1d", ("max_workers: 2", "max_workers: two"))
    assert problems(path) == [f"{line(path, 'max_workers: two')}: max_workers: 'two' is not of type 'integer'"]
    both = 'max_workers: {}\n    resources: {{"TPU": 8, "baton-decode"'
    path = changed(home, "v6e-2p2d", (both.format(2), both.format(1)))
    assert problems(path) == [
        f"{line(path, 'available_node_types')}: the node types offer 1 of baton-decode, the configuration wants 2"
    ]


def test_a_slice_smaller_than_a_worker(home: Path) -> None:
    path = changed(home, "v6e-1p1d", ("acceleratorType: v6e-8", "acceleratorType: v6e-4"), ('"TPU": 8', '"TPU": 4'))
    found = problems(path)
    assert any("prefill has 4 TPU chips, a worker needs more (engine.tp 8" in text for text in found)


def test_fewer_nodes_than_the_autoscaler_may_want(home: Path) -> None:
    path = changed(home, "v6e-autoscale", ("max_workers: 4", "max_workers: 3"))
    place = line(path, "available_node_types:")
    assert problems(path) == [
        f"{place}: the node types offer 3 of baton-{role}, the configuration wants 4" for role in ("prefill", "decode")
    ]


def test_a_slice_that_declares_other_chips(home: Path) -> None:
    path = changed(home, "v6e-1p1d", ("acceleratorType: v6e-8", "acceleratorType: v6e-4"))
    assert any("this slice has 4 chips, resources.TPU says 8" in text for text in problems(path))


def test_a_slice_of_several_hosts(home: Path) -> None:
    path = changed(home, "v6e-1p1d", ("acceleratorType: v6e-8", "acceleratorType: v6e-16"))
    found = problems(path)
    assert sum("v6e with 16 chips is 4 hosts, a worker spans 1 (fleet.hosts_per_worker)" in text for text in found) == 2
    assert sum("this slice has 16 chips on 4 hosts, resources.TPU says 8" in text for text in found) == 2


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("tpu7x", "tpu7x-32", "tpu7x-64", "tpu7x with 32 chips is 8 hosts, a worker spans 4"),
        ("tpu7x", "tpu7x-16", "tpu7x-8", "tpu7x with 4 chips is 1 hosts, a worker spans 2"),
        ("tpu7x", '4, "baton-decode"', '8, "baton-decode"', "this slice has 16 chips on 4 hosts, resources.TPU says 8"),
        (
            "tpu7x",
            '4, "baton-prefill"',
            '2, "baton-prefill"',
            "prefill has 2 TPU chips, a worker needs more (engine.tp 16",
        ),
        ("v6e", "acceleratorType: v6e-16", "acceleratorType: v6e-32", "v6e with 32 chips is 8 hosts, a worker spans 4"),
        ("v6e", "acceleratorType: v6e-16", "acceleratorType: v6e-8", "v6e with 8 chips is 1 hosts, a worker spans 4"),
        ("v6e", '"TPU": 4', '"TPU": 8', "this slice has 16 chips on 4 hosts, resources.TPU says 8"),
        (
            "v6e",
            '"TPU": 4',
            '"TPU": 2',
            "decode has 2 TPU chips, a worker needs more (engine.tp 16, fleet.tpus_per_worker 16",
        ),
    ],
)
def test_a_slice_that_is_not_the_workers(home: Path, name: str, old: str, new: str, message: str) -> None:
    found = problems(changed(home, f"{name}-multihost", (old, new)))
    assert any(message in text for text in found), found


def test_a_model_that_does_not_fit(home: Path) -> None:
    """A dense model of 70 B parameters: 8 chips of v5e have 126 GiB in all."""
    sizes = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64}
    model = dense_model(home / "big", **sizes)
    toml = home / "deploy/ray/v5e-1p1d.toml"
    toml.write_text(toml.read_text().replace("Qwen/Qwen3-8B", str(model)))
    found = problems(home / "deploy/ray/v5e-1p1d.yaml")
    assert len(found) == 2 and all("GiB of weights; 8 chips of v5litepod may use 107.1 GiB" in text for text in found)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ({"num_key_value_heads": 3}, (), "num_key_value_heads"),
        (
            {},
            ("max_model_len = 16384", "max_model_len = 65536"),
            "max_model_len is 65536, the model's context is 32768",
        ),
        ({"num_hidden_layers": 230}, ("= 16384", "= 32768"), "where one sequence of batch.max_model_len needs 256"),
        ({}, ("[engine]", '[engine]\nnumerics = "strict"'), "numerics is strict, which is not supported on TPUs"),
        ({"head_dim": 96}, (), "head_dim 96 is not supported; supported: 64, 128"),
    ],
)
def test_a_model_that_this_slice_could_not_start(
    home: Path, sizes: dict[str, int], settings: tuple[str, ...], message: str
) -> None:
    """What the engine itself would say, once the slices were paid for."""
    own = {"hidden_size": 4096, "num_hidden_layers": 8, "intermediate_size": 16384}
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8}
    model = dense_model(home / "odd", **(own | heads | sizes))
    toml = home / "deploy/ray/v5e-1p1d.toml"
    toml.write_text(toml.read_text().replace("Qwen/Qwen3-8B", str(model)))
    if settings:
        toml.write_text(toml.read_text().replace(*settings, 1))
    found = problems(home / "deploy/ray/v5e-1p1d.yaml")
    assert len(found) == 2 and all(message in text for text in found), found


def test_head_and_workers_of_different_versions(home: Path) -> None:
    pin = '"ray[default,serve]==2.60.0" "jax'
    path = changed(home, "v6e-1p1d", (pin, pin.replace("2.60.0", "2.59.1")))
    assert problems(path) == [f"{line(path, '2.59.1')}: worker_setup_commands installs ray 2.59.1, other nodes 2.60.0"]
    path = changed(home, "v6e-2p2d", (pin, pin.replace("==2.60.0", "")))
    place = line(path, "jax[tpu]")
    assert problems(path) == [
        f"{place}: worker_setup_commands does not say which ray, so that nodes may differ: ray==VERSION"
    ]


def test_what_nodes_install_is_pinned(home: Path) -> None:
    """A slice that is made next week must not get another jax."""
    path = changed(
        home, "v6e-1p1d", ('-c ~/baton/constraints.txt "ray[default,serve]==2.60.0" "jax', '"ray==2.60.0" "jax')
    )
    unpinned = "worker_setup_commands does not say which jax, so that nodes may differ: jax==VERSION"
    assert problems(path) == [f"{line(path, 'jax[tpu]')}: {unpinned}"]
    path = changed(home, "v5e-1p1d", ('"jax[tpu]"', '"jax[tpu]==0.9.0"'))
    (found,) = problems(path)
    assert found.startswith(
        f"{line(path, 'jax[tpu]')}: worker_setup_commands wants jax 0.9.0, ~/baton/constraints.txt 0.1"
    )
    (home / "constraints.txt").unlink()
    assert any("constraints.txt, to be mounted at" in text for text in problems(home / "deploy/ray/v6e-2p2d.yaml"))


def test_no_wheel(home: Path) -> None:
    (home / "dist/baton-0.1.0-py3-none-any.whl").unlink()
    path = home / "deploy/ray/v6e-1p1d.yaml"
    assert problems(path) == [
        f"{line(path, 'baton/wheel: dist')}: dist has no wheel, which nodes install; `make wheel` writes it"
    ]


def test_a_zone_elsewhere_and_software_of_another_generation(home: Path) -> None:
    zone = ("availability_zone: us-east5-b", "availability_zone: us-west4-a")
    path = changed(home, "v6e-1p1d", zone, ("v2-alpha-tpuv6e", "v2-alpha-tpuv5-lite"))
    assert problems(path)[0] == f"{line(path, 'us-west4-a')}: us-west4-a is not in us-east5, the region of this file"
    runtimes = [number for number, text in enumerate(path.read_text().splitlines(), 1) if "runtimeVersion" in text]
    wrong = "v2-alpha-tpuv5-lite is for v5litepod, this slice is v6e"
    assert problems(path)[1:] == [f"{number}: {wrong}" for number in runtimes]


def test_images_of_different_versions(home: Path) -> None:
    images = "docker:\n  container_name: baton\n  head_image: r/baton:0.2-cpu\n  worker_image: r/baton:0.{}-tpu\n"
    path = home / "deploy/ray/v6e-1p1d.yaml"
    text = path.read_text()
    path.write_text(text + images.format(2))
    assert problems(path) == []
    path.write_text(text + images.format(1))
    assert problems(path) == [
        f"{line(path, 'worker_image')}: the head runs r/baton:0.2-cpu, workers r/baton:0.1-tpu: not of one version"
    ]


def test_a_wrong_configuration(home: Path) -> None:
    toml = home / "deploy/ray/v6e-1p1d.toml"
    toml.write_text(toml.read_text().replace('host = "node"', 'host = "127.0.0.1"'))
    assert 'a cluster needs fleet.host = "node"' in problems(home / "deploy/ray/v6e-1p1d.yaml")[0]
    toml.write_text(toml.read_text() + "\nnonsense = 1\n")
    assert "nonsense" in problems(home / "deploy/ray/v6e-1p1d.yaml")[0]


def test_up_refuses_before_anything_starts(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toml = home / "deploy/ray/v6e-1p1d.toml"
    toml.write_text(toml.read_text().replace("Qwen/Qwen3-32B", "demo"))
    (home / ".config/baton/v6e-1p1d/secret").unlink()
    path = home / "deploy/ray/v6e-1p1d.yaml"
    assert cli.main(["up", str(path)]) == 2
    errors = capfd.readouterr().err
    assert "nothing was started" in errors and f"{path}:{line(path, '~/baton/secret:')}: " in errors


def test_up_check(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toml = home / "deploy/ray/v6e-1p1d.toml"
    model = dense_model(home / "small", hidden_size=1024, num_attention_heads=8, num_key_value_heads=8)
    toml.write_text(toml.read_text().replace("Qwen/Qwen3-32B", str(model)))
    assert cli.main(["up", str(home / "deploy/ray/v6e-1p1d.yaml"), "--check"]) == 0
    assert "no problem found" in capfd.readouterr().out


def test_a_model_that_the_hub_does_not_tell_of_is_noted_and_one_that_it_does_not_have_refused(home: Path) -> None:
    path = home / "deploy/ray/v6e-1p1d.yaml"
    asked: list[str] = []
    file = ClusterFile(path, asked.append)  # type: ignore[arg-type]  # it says None
    assert file.check() == [] and asked == ["Qwen/Qwen3-32B"], "once for both pools"
    assert file.notes == ["not known, as the hub does not answer: whether Qwen/Qwen3-32B fits"]

    def refuse(name: str) -> Path | None:
        raise CheckpointError(f"the hub has no model {name}")

    found = ClusterFile(path, refuse).check()
    assert len(found) == 2 and "the hub has no model Qwen/Qwen3-32B" in found[0].text
    assert found[0].line == line(path, "acceleratorType")


def test_every_option_in_the_files_exists() -> None:
    """`baton serve` in the start commands: each flag is one that the grammar knows."""
    serve = cli.build_parser()._subparsers._group_actions[0].choices["serve"]  # type: ignore[union-attr,index]
    known = {option for action in serve._actions for option in action.option_strings}
    for path in FILES:
        commands = [c for c in ClusterFile(path, local).content["head_start_ray_commands"] if "baton serve" in c]
        assert len(commands) == 1
        flags = [word for word in commands[0].split("baton serve")[1].split() if word.startswith("--")]
        assert flags and set(flags) <= known


def test_nodes_install_the_newest_wheel_even_of_the_same_version(tmp_path: Path) -> None:
    """`ray up` copies what is new in dist/ and leaves what was there."""
    wheels = tmp_path / "baton/wheel"
    wheels.mkdir(parents=True)
    for name, at in (("baton-0.2.whl", 1), ("baton-0.1.whl", 2)):  # a rollback
        (wheels / name).touch()
        os.utime(wheels / name, (at, at))
    installs = [
        command
        for path in FILES
        for commands in ("head_setup_commands", "worker_setup_commands")
        for command in ClusterFile(path, local).content.get(commands, ())
        if "pip install" in command
    ]
    assert len(installs) == 2 * (len(FILES) - 1), "all but local.yaml, where Baton is installed already"
    for command in installs:
        words = command.replace("uv pip install", "printf '%s\\n'", 1)
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        given = subprocess.check_output(["bash", "-c", words], env=environment, text=True).splitlines()
        assert [word for word in given if word.endswith(".whl")] == [str(wheels / "baton-0.1.whl")]
        assert "--reinstall-package=baton" in given


def test_the_skypilot_file(home: Path) -> None:
    """Its command is one that Baton takes, and fits the machine it asks for."""
    task = yaml.safe_load((ROOT / "deploy/sky/v6e-1p1d.yaml").read_text())
    assert task.keys() == {"name", "resources", "file_mounts", "setup", "run"}
    words = shlex.split(task["run"].splitlines()[-1].split("baton serve")[1])
    known, unknown = cli.build_parser().parse_known_args(["serve", *words])
    flags = [
        word for name in ("prefill", "decode", "tp", "host", "port") for word in (f"--{name}", getattr(known, name))
    ]
    config = read_config([*flags, *unknown], None)
    chips = int(task["resources"]["accelerators"].rpartition("-")[2])
    assert config.fleet.tpus_per_worker * (config.fleet.prefill + config.fleet.decode) == chips
    assert config.engine.tp == config.fleet.tpus_per_worker
    assert task["resources"]["ports"] == config.gateway.port
    assert {str(known.secret_file), str(known.api_keys_file)} <= task["file_mounts"].keys()
