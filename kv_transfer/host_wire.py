"""Messages between the hosts of one worker; frames are those of `kv_transfer.channel`.

leader (listens)                        follower (calls)
Challenge -------------------------->
          <-------------------------- HostHello, with a proof over both nonces
HostWelcome, with a proof likewise, or Refused with the reason
Begin ------------------------------>  loads the checkpoint
          <-------------------------- HostReady, or HostFailed with the reason
device commands, in order ---------->  (`engine_core.host_commands`)
          <------- HostBeat ---------> either way, several times a second
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine_core.host_commands import Begin, DeviceCommand, ExportCommand
from engine_core.messages import Challenge, KvShard, Message, Refused

HOST_PROTOCOL = 1


class HostHello(Message, frozen=True):
    """First message of a follower: which host of which life of which worker it is."""

    protocol: int
    worker_id: str
    incarnation: int
    number: int
    secret_proof: bytes
    nonce: bytes


class HostWelcome(Message, frozen=True):
    """The leader's answer."""

    secret_proof: bytes


class HostReady(Message, frozen=True):
    """Follower: the checkpoint is loaded.

    Attributes:
        kv: where this host hands KV over; None where it hands none.
    """

    kv: KvShard | None


class HostFailed(Message, frozen=True):
    """Follower: it can never be ready. `code` is from `engine_core.errors`."""

    code: str
    message: str


class HostBeat(Message, frozen=True):
    """Either way: this process still runs. `inflight_bytes`: KV that decode workers have not collected yet."""

    inflight_bytes: int


FromFollower = HostHello | HostReady | HostFailed | HostBeat
FromLeader = Challenge | Refused | HostWelcome | Begin | HostBeat | DeviceCommand | ExportCommand

from_follower: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromFollower)
from_leader: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromLeader)
