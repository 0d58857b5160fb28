"""Moving rows between the devices of a mesh axis, each device sending each other as many as it has for it.

TPU and GPU have `lax.ragged_all_to_all`; XLA:CPU does not, and gets the same bytes from an all-gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Leg(NamedTuple):
    """One direction of an exchange: the run of rows that one device has for (or gets from) each other one."""

    starts: jax.Array  # [devices] i32, where the run begins on this device
    sizes: jax.Array  # [devices] i32, rows
    places: jax.Array  # [devices] i32, where it begins on the other device


class Traffic(NamedTuple):
    """Who sends how many rows to whom, as one device of the axis needs to know it.

    Rows received lie in order of sender, within a sender in order of expert.
    """

    outgoing: Leg
    incoming: Leg
    sizes: jax.Array  # [E / devices] i32, rows that arrive for each of this device's experts
    by_expert: jax.Array  # [R] i32, received row at each place of the order by expert; any row beyond the last
    by_sender: jax.Array  # [R] i32, the inverse


@dataclass(frozen=True)
class Exchange:
    """Exchanges over one mesh axis; inside shard_map.

    Attributes:
        axis: name of the mesh axis, along which experts are split in order.
        size: devices along it.
        native: use `lax.ragged_all_to_all`; otherwise its equivalent by an all-gather.
    """

    axis: str
    size: int
    native: bool

    def plan(self, sizes: jax.Array, max_rows: int) -> Traffic:
        """Agree on who sends what. One small all-gather.

        Args:
            sizes: [E] i32, rows that this device has for each expert, sorted by expert.
            max_rows: R, the most rows that a device can receive.
        """
        me = lax.axis_index(self.axis)
        counts = lax.all_gather(sizes, self.axis).reshape(self.size, self.size, -1)  # [sender, receiver, experts each]
        runs = counts.sum(axis=2)
        starts, places = _before(runs, axis=1), _before(runs, axis=0)
        here = counts[:, me]  # [sender, experts here]
        received = _before(here.reshape(-1), axis=0).reshape(here.shape)
        sorted_ = _before(here.T.reshape(-1), axis=0).reshape(here.T.shape).T
        return Traffic(
            outgoing=Leg(starts[me], runs[me], places[me]),
            incoming=Leg(places[:, me], runs[:, me], starts[:, me]),
            sizes=here.sum(axis=0),
            by_expert=_moved((received - sorted_).T, here.T, max_rows),
            by_sender=_moved(sorted_ - received, here, max_rows),
        )

    def send(self, rows: jax.Array, traffic: Traffic) -> jax.Array:
        """[M, D] sorted by expert -> [R, D] received, in order of sender. Rows beyond the last hold anything."""
        return self._move(rows, traffic.outgoing, traffic.incoming, traffic.by_sender.size)

    def send_back(self, rows: jax.Array, traffic: Traffic, count: int) -> jax.Array:
        """[R, D] in order of sender -> [count, D], each row where it was when it was sent."""
        return self._move(rows, traffic.incoming, traffic.outgoing, count)

    def _move(self, rows: jax.Array, outgoing: Leg, incoming: Leg, count: int) -> jax.Array:
        if self.native:
            landing = jnp.zeros((count, rows.shape[1]), rows.dtype)
            moved: jax.Array = lax.ragged_all_to_all(
                rows,
                landing,
                outgoing.starts,
                outgoing.sizes,
                outgoing.places,
                incoming.sizes,
                axis_name=self.axis,
            )
            return moved
        everything = lax.all_gather(rows, self.axis, tiled=True)
        sender_starts = jnp.arange(self.size, dtype=jnp.int32) * rows.shape[0]
        source = _moved(sender_starts + incoming.places - incoming.starts, incoming.sizes, count)
        gathered: jax.Array = everything.at[source].get(mode="clip")
        return gathered


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """Sum of what comes before each element along an axis."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _moved(shifts: jax.Array, sizes: jax.Array, count: int) -> jax.Array:
    """[count] i32: each place plus the shift of the run it is in, for runs of `sizes` that lie one behind the other."""
    shift = jnp.repeat(shifts.reshape(-1), sizes.reshape(-1), total_repeat_length=count)
    return jnp.arange(count, dtype=jnp.int32) + shift
