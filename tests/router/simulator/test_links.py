import pytest

from router.simulator.links import Links


def test_an_interface_moves_one_thing_at_a_time():
    links = Links(10.0)
    assert links.send("p0", "d0", 50, 1.0) == pytest.approx(6.0)
    assert links.send("p0", "d1", 50, 1.0) == pytest.approx(11.0)  # behind the first
    assert links.send("p1", "d1", 50, 1.0) == pytest.approx(11.0)  # beside it, as it has the time
    assert links.num_bytes == 150


def test_a_busy_receiver_keeps_its_senders_from_nobody_else():
    links = Links(10.0)
    links.send("p0", "d0", 1000, 0.0)
    assert links.send("p1", "d0", 10, 0.0) == pytest.approx(101.0)
    assert links.send("p1", "d1", 10, 0.0) == pytest.approx(2.0)
