"""Every control message between processes, declared once.

Gateway <-> worker: one long-lived connection from each gateway to each worker (`kv_transfer.channel`).
Decode -> prefill: one long-lived connection per pair; tickets go up, KV frames come down (`kv_transfer.wire`).
"""

from __future__ import annotations

import msgspec

from engine_core.types import FinishReason, Numerics, Request, Role, Tier, TokenLogprobs

PROTOCOL_VERSION = 5


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base: on the wire an array whose first item is the class name."""


class KvShard(msgspec.Struct, frozen=True, array_like=True):
    """Where a host of a worker hands over KV heads [first_head, first_head + num_heads)."""

    host: str
    kv_port: int
    first_head: int
    num_heads: int


class PeerAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a worker listens: `port` for gateways (control), `kv_port` for workers that fetch KV.

    Attributes:
        kv_port: 0 where it hands nothing over: a decode worker of several hosts.
        kv_shards: where several hosts hand KV over, each its heads, all of them; the first is host and kv_port again.
    """

    host: str
    port: int
    kv_port: int
    kv_shards: tuple[KvShard, ...] = ()

    @property
    def kv_name(self) -> str:
        """What links from there are told by: "host:port"."""
        return f"{self.host}:{self.kv_port}"


class WorkerInfo(msgspec.Struct, frozen=True):
    """What the fleet and the gateways know of a worker. (worker_id, incarnation) names one life of it.

    Attributes:
        fingerprint: hash of model and cache layout; unequal means never pair.
        num_slots: rows of the decode batch (prefill: sequences per step).
        num_pages: size of its page pool.
        page_size: tokens per page.
        max_model_len: tokens of prompt plus answer at most.
        chunk_tokens: prompt tokens of one step at most.
        block_bytes: of the KV of one block on the wire.
        block_namespace: keys its block hashes (`block_hash.BlockHasher`), as hex; empty where it keeps no prefix cache.
    """

    worker_id: str
    incarnation: int
    role: Role
    address: PeerAddress
    fingerprint: str
    numerics: Numerics
    num_slots: int
    num_pages: int
    page_size: int
    max_model_len: int
    chunk_tokens: int = 0
    block_bytes: int = 0
    block_namespace: str = ""


class Challenge(Message, frozen=True):
    """Worker -> gateway, first of all: random bytes that the gateway's `Hello.secret_proof` must cover."""

    nonce: bytes


class Hello(Message, frozen=True):
    """First message of a gateway, answered by the worker's, which carries its `WorkerInfo`.

    Attributes:
        secret_proof: HMAC over both nonces where the cluster has a secret, else empty.
        nonce: the gateway's random bytes, covered by the worker's proof.
    """

    protocol: int
    peer: str
    info: WorkerInfo | None = None
    secret_proof: bytes = b""
    nonce: bytes = b""


class Refused(Message, frozen=True):
    """Listener -> peer: why the connection is about to be closed. `code` is from `engine_core.errors`."""

    code: str
    message: str


class Prefill(Message, frozen=True):
    """Gateway -> prefill worker: compute the prompt, sample the first token, push KV to whoever holds the ticket.

    Attributes:
        donor: who may have the prompt's leading blocks that this worker lacks; it is told so by a `Donate`.
        donor_blocks: how many leading blocks of the prompt it is believed to hold, in blocks of this worker.
    """

    request: Request
    deadline_ms: int
    donor: PeerAddress | None = None
    donor_blocks: int = 0


class Decode(Message, frozen=True):
    """Gateway -> decode worker: generate. `prefill` is None for local prefill on this worker."""

    request: Request
    prefill: PeerAddress | None
    deadline_ms: int


class Donate(Message, frozen=True):
    """Gateway -> worker of either role, together with a `Prefill` that names it as the donor: hand cached blocks over.

    What comes of it is told to the prefill worker alone.

    Attributes:
        request: that of the `Prefill`.
        num_blocks: at most so many leading blocks of the prompt, in blocks of this worker.
    """

    request: Request
    num_blocks: int
    deadline_ms: int


class Cancel(Message, frozen=True):
    """Gateway -> worker: free everything that (request_id, epoch) holds. Unknown ids are fine."""

    request_id: str
    epoch: int


class Beat(Message, frozen=True):
    """Gateway -> worker, in answer to each `Load`: it reads, and its requests are still wanted."""


class TokenChunk(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one sequence from one step.

    Attributes:
        position: index of the first of `token_ids` among the generated tokens (0 is the first generated token).
        token_ids: new tokens; a stop token that ended the sequence is not among them.
        finish_reason: set on the last chunk.
        logprobs: one per token where the request asked for them, else empty.
        cached_tokens: prompt tokens found in the prefix cache; sent on the first chunk of each worker.
        prompt_logprobs: with the first token, one per prompt token but the first, where the request asked for them.
        stage_s: how long this worker's stages took: queue, prefill or hand-over, decode. On the first token of a prompt
            that it computed and on the last chunk; else empty.
    """

    request_id: str
    epoch: int
    position: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = []
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = []
    stage_s: tuple[float, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it tells of no token and no end: a donor's, which may hold a part of the prompt only."""
        return not self.token_ids and self.finish_reason is None


class Tokens(Message, frozen=True):
    """Worker -> gateway: all chunks of one step for this gateway's requests."""

    chunks: list[TokenChunk]


class Failed(Message, frozen=True):
    """Worker -> gateway: the request ended without an answer. `code` is from `engine_core.errors`."""

    request_id: str
    epoch: int
    code: str
    message: str
    retryable: bool


class Load(Message, frozen=True):
    """Worker -> gateways, at most every 250 ms and at least every second: also the progress beat."""

    running: int
    waiting: int
    queued_tokens: int
    free_pages: int
    draining: bool
    compiles_after_warmup: int
    preemptions: int = 0


class StepSums(msgspec.Struct, frozen=True, array_like=True):
    """What some steps, timed together, did and how long they took.

    Attributes:
        prefill_steps, prefill_tokens: steps that computed prompt tokens, and these tokens.
        prefill_context: over these tokens, the sum of how many tokens each attended to.
        decode_steps, decode_rows: decode steps, and the sequences they advanced.
        decode_context: over these rows, the sum of their KV tokens.
        seconds: of all of it.
    """

    prefill_steps: int
    prefill_tokens: int
    prefill_context: int
    decode_steps: int
    decode_rows: int
    decode_context: int
    seconds: float


class Measured(Message, frozen=True):
    """Worker -> gateways, with a beat: samples of its steps since the last one, for the cost model."""

    steps: list[StepSums]


class SnapshotRequest(Message, frozen=True):
    """Gateway -> worker: send block events from now on, and all blocks held now.

    Attributes:
        number: of the request on this connection; its answer carries it.
    """

    number: int


class BlockEvents(Message, frozen=True):
    """Worker -> gateways: how its set of cached blocks changed: cleared, then these left, then those came.

    Blocks are named by the first `block_hash.KEY_BYTES` of their hashes, concatenated. None is in both strings.

    Attributes:
        sequence: grows by one with each message of an incarnation, beginning at 1.
        tier: of `removed` and `stored`; `cleared` is about all tiers.
    """

    worker_id: str
    incarnation: int
    sequence: int
    tier: Tier
    cleared: bool
    removed: bytes
    stored: bytes


class BlockSnapshot(Message, frozen=True):
    """Worker -> one gateway: a part of what its cache held after event `sequence`.

    Attributes:
        number: of the `SnapshotRequest`.
        part, num_parts: which part this is, from 0; at least one.
        stored: as in `BlockEvents`.
    """

    worker_id: str
    incarnation: int
    number: int
    part: int
    num_parts: int
    sequence: int
    tier: Tier
    stored: bytes


class Distribution(msgspec.Struct, frozen=True, array_like=True):
    """A histogram of seconds over `worker_stats.STAGE_BOUNDS`: values per bucket, the last one unbounded."""

    counts: list[int]
    total_s: float


class LinkStats(msgspec.Struct, frozen=True, array_like=True):
    """Hand-overs from one worker: complete ones, failed ones, bytes received, seconds of the complete ones."""

    transfers: int
    failures: int
    num_bytes: int
    seconds: float


class WorkerStats(Message, frozen=True):
    """Worker -> gateways, once a second: what it has counted since its start (`engine_core.worker_stats`).

    Attributes:
        queue: from arrival at this worker to admission (all pages reserved).
        prefill: from admission to the first token, where the prompt was computed here.
        transfer: from the ticket to the last verified block, where it was computed elsewhere or fetched from a donor.
        decode: from the first token (or the slot, after a hand-over) to the last.
        prefill_padding, decode_padding: token rows and sequence rows that padded steps to their buckets.
        query_tokens, hit_tokens: looked up in the prefix cache, and found there.
        busy_s: engine thread at work.
        loop_lag_s: longest delay of the event loop since the last of these messages.
        memory_used_bytes, memory_limit_bytes: of the devices together; where they are CPUs, of the process and machine.
        links: by `PeerAddress.kv_name` of who sent it.
        refused: connections that were ended for what they said, by the error's code.
    """

    queue: Distribution
    prefill: Distribution
    transfer: Distribution
    decode: Distribution
    prefill_steps: int
    prefill_tokens: int
    prefill_padding: int
    decode_steps: int
    decode_rows: int
    decode_padding: int
    query_tokens: int
    hit_tokens: int
    busy_s: float
    loop_lag_s: float
    memory_used_bytes: int
    memory_limit_bytes: int
    links: dict[str, LinkStats]
    refused: dict[str, int]


GatewayToWorker = Hello | Prefill | Decode | Donate | Cancel | Beat | SnapshotRequest
WorkerToGateway = (
    Challenge | Hello | Refused | Tokens | Failed | Load | Measured | WorkerStats | BlockEvents | BlockSnapshot
)
