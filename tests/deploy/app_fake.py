"""The Serve application of `deploy.ray_app` with fakes, on a Ray cluster that runs: PORT DIRECTORY RAY_ADDRESS."""

from __future__ import annotations

import sys

import ray
from ray import serve

from deploy import launch, ray_app
from engine_core.types import Role

FAKES = {Role.PREFILL: "tests.deploy.fakes:FakePrefillWorker", Role.DECODE: "tests.deploy.fakes:FakeDecodeWorker"}


def main(port: str, directory: str, ray_address: str) -> int:
    """Deploy, print the workers, delete."""
    flags = ["--port", port, "--fleet.host", "node", "--fleet.pool_resources", "true", "--model", directory]
    config = launch.read_config(flags, None)
    ray.init(address=ray_address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    app = ray_app.application(config, b"a secret of the test", FAKES, "tests.deploy.fake_gateway:FakeGateway")
    serve.run(app, name="baton", route_prefix=None)
    sys.stdout.write("running\n")
    sys.stdout.flush()
    sys.stdin.readline()
    serve.delete("baton")
    sys.stdout.write("deleted\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
