"""What the leader of a worker over several hosts tells the others: every device call, in the order of its own.

All hosts of a worker run one SPMD program: each dispatches the same steps on its own devices. Arrays travel as raw
bytes whose shapes a follower knows; it checks their size before it uses them (`engine_core.follower`).
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from engine_core.messages import Message, TokenChunk

PIECE_BYTES = 8 << 20  # of KV in one message


class RunStep(Message, frozen=True):
    """One step of a bucket, named by its token rows and sequence rows; `inputs` are the leaves of its `StepInputs`."""

    num_tokens: int
    num_rows: int
    inputs: bytes


class InitSlot(Message, frozen=True):
    """`Engine.init_slot`."""

    slot: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]


class Export(msgspec.Struct, frozen=True, array_like=True):
    """For whom pages are gathered: blocks of one hand-over, in the order of the pages."""

    request_id: str
    epoch: int
    blocks: tuple[int, ...]


class Gather(Message, frozen=True):
    """`Engine.gather`; each host hands its own KV heads of these pages over where `export` says so."""

    pages: tuple[int, ...]
    export: Export | None


class KvPiece(Message, frozen=True):
    """Bytes of the KV heads that the follower holds, for the next `Scatter`, layer by layer."""

    content: bytes


class Scatter(Message, frozen=True):
    """`Engine.scatter` of the pieces sent since the last one."""

    pages: tuple[int, ...]


class ExportOffer(Message, frozen=True):
    """`KvSender.offer`, to be repeated by each host for its own heads."""

    request_id: str
    epoch: int
    lease_s: float


class ExportFinish(Message, frozen=True):
    """`KvSender.finish`, likewise."""

    request_id: str
    epoch: int
    first_token: TokenChunk


class ExportAbort(Message, frozen=True):
    """`KvSender.abort`, likewise; `code` is from `engine_core.errors`."""

    request_id: str
    epoch: int
    code: str
    message: str
    retryable: bool


DeviceCommand = RunStep | InitSlot | Gather | KvPiece | Scatter
ExportCommand = ExportOffer | ExportFinish | ExportAbort


class KvHeads(msgspec.Struct, frozen=True, array_like=True):
    """KV heads [first, first + count)."""

    first: int
    count: int


class Begin(Message, frozen=True):
    """Leader -> follower: open the replica with so many pages; its fingerprint must come out as `fingerprint`."""

    num_pages: int
    fingerprint: str


class Followers(Protocol):
    """The other hosts of a worker, as its leader sees them. `send` is called on one thread, the engine's."""

    def begin(self, begin: Begin) -> None:
        """Let them load the checkpoint."""
        ...

    def wait_ready(self) -> None:
        """Wait until all have loaded it.

        Raises:
            WorkerDied: one of them is gone.
            ConfigError: one of them cannot.
        """
        ...

    def send(self, command: DeviceCommand) -> None:
        """Tell all of them."""
        ...

    def send_each(self, commands: list[KvPiece]) -> None:
        """Tell each its own, host 1 first; waits while they are slow."""
        ...
