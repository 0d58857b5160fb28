"""Names of TPU slices, and the constants of their chips."""

import pytest

from engine_core.aot.generation import GENERATIONS
from engine_core.aot.topology import find_topology, topologies
from engine_core.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "libtpu_name", "chips", "devices"),
    [
        ("v5e-4", "v5e:2x2", 4, 4),
        ("v6e-8", "v6e:2x4", 8, 8),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("v5p-8", "v5p:2x2x1", 4, 4),  # named after its TensorCores, two in a chip, which JAX shows as one device
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8),  # likewise, but JAX shows two devices
    ],
)
def test_names_as_google_sells_them(name, libtpu_name, chips, devices):
    topology = find_topology(name)
    assert (topology.libtpu_name, topology.num_chips, topology.num_devices) == (libtpu_name, chips, devices)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown TPU topology 'v7-8'; known are v5e-1, .*tpu7x-8"):
        find_topology("v7-8")


def test_names_are_unique():
    names = [topology.name for topology in topologies()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_clock_follows_from_the_peak(name):
    """A core has four MXUs of 128 x 128 (v5) or 256 x 256 cells, each doing two operations per cycle."""
    generation = GENERATIONS[name]
    per_cycle = 4 * 2 * (128 if name.startswith("v5") else 256) ** 2
    assert generation.bf16_flops / generation.tensor_cores / per_cycle == pytest.approx(generation.clock_hz, rel=0.01)


def test_peaks_by_dtype():
    v6e, tpu7x = GENERATIONS["v6e"], GENERATIONS["tpu7x"]
    assert v6e.peak_flops("int8") == 2 * v6e.peak_flops("bfloat16")
    assert v6e.peak_flops("float8_e4m3fn") == v6e.peak_flops("bfloat16")
    assert tpu7x.peak_flops("float8_e4m3fn") == 2 * tpu7x.peak_flops("bfloat16")
