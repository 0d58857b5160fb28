"""The costs of all pairs and the best of them, compiled: what `PairCosts.all` is by definition.

What depends on a worker alone is kept in records, and only those that have changed are written again.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Hashable, Sequence
from typing import Any

from engine_core.messages import WorkerInfo
from engine_core.types import Role
from router.candidate import Candidate
from router.compiled.library import Compiled
from router.cost_model import TransferModel
from router.decision import Option, Terms
from router.donors import Kinship, kinship
from router.pair_costs import NUM_RANKED, Asked, PlacementConfig, Ranking, Weighed
from router.standing import Standing

# Parts of the structures in ranking.cc.
_STANDING = struct.Struct("=13d")
_SPEED = struct.Struct("=6d")
_INFO = struct.Struct("=6q")
_LINK = struct.Struct("=q")
_SPEED_AT = _STANDING.size
_INFO_AT = _SPEED_AT + _SPEED.size
_LINK_AT = _INFO_AT + _INFO.size
_WORKER_SIZE = _LINK_AT + _LINK.size
_FLEET = struct.Struct("=2Q5q7d")
_PRICES = struct.Struct("=2d")
_PRICES_AT = _FLEET.size
_ASKED = "=2d3q"
_ASKED_AT = _PRICES_AT + _PRICES.size
_RANKED = struct.Struct("=8q9d")


class _Known:
    """What a worker's record says."""

    __slots__ = ("info", "speed", "standing")

    def __init__(self) -> None:
        self.info: WorkerInfo | None = None
        self.standing: Standing | None = None
        self.speed: tuple[float, ...] = ()


class _Records:
    """Bytes that keep their address."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.content)) if size else 0


class CompiledRanking:
    """See the module. Remembers the workers that it was asked about last."""

    def __init__(self, compiled: Compiled, config: PlacementConfig, transfers: TransferModel) -> None:
        self._rank = compiled.rank
        self._config = config
        self._transfers = transfers
        self._workers: list[Candidate] = []
        self._split = -1  # so many of them are sources
        self._num_readers = -1  # so many of them are not only there to donate
        self._keys: list[tuple[str, int]] = []
        self._reader_keys: list[tuple[str, int]] = []
        self._names: list[str] = []
        self._known: list[_Known] = []
        self._fingerprints: dict[str, int] = {}  # numbers of them
        self._kinships: dict[Kinship, int] = {}  # numbers of them
        self._links: Any = None
        self._links_version = -1
        self._records = _Records(0)
        self._question = _Records(0)
        self._asked = struct.Struct(_ASKED)
        self._found = _Records(NUM_RANKED * _RANKED.size)

    def best(self, sources: Sequence[Candidate], targets: Sequence[Candidate], asked: Asked, now: float) -> Ranking:
        """The cheapest pairs, as `PairCosts.all` has them.

        Args:
            sources, targets: prefill and decode workers that may be used; at least one target.
        """
        num_tokens, output_tokens, held, last, told, leaving = asked
        self._follow(sources, targets, leaving)
        last_source = last_target = -1
        if last is not None:
            last_source = self._position(last[0], 0, self._split)
            last_target = self._position(last[1], self._split, self._num_readers)
        held_by, told_by, keys = held.get, told.get, self._keys
        self._asked.pack_into(
            self._question.content,
            _ASKED_AT,
            now,
            output_tokens,
            num_tokens,
            last_source,
            last_target,
            *[held_by(key, 0) for key in self._reader_keys],
            *([told_by(key, 0) for key in keys] if told else bytes(len(keys))),
        )
        num_weighed = self._rank(self._question.address, self._found.address)
        content, count = self._found.content, min(num_weighed, NUM_RANKED)
        return Ranking(
            [self._weighed(_RANKED.unpack_from(content, at * _RANKED.size)) for at in range(count)], num_weighed
        )

    def _weighed(self, ranked: tuple[Any, ...]) -> Weighed:
        source, target, donor, held, missing, held_decode, fetched, num_bytes, reading_s, *terms = ranked
        split, names, workers = self._split, self._names, self._workers
        option = Option(
            names[source] if source >= 0 else None,
            names[split + target],
            names[donor] if donor >= 0 else None,
            held,
            held_decode,
            fetched,
            Terms(*terms),
        )
        reader = workers[source] if source >= 0 else None
        giver = workers[donor] if donor >= 0 else None
        return Weighed(reader, workers[split + target], missing, reading_s, num_bytes, giver, option)

    # the workers

    def _position(self, key: Hashable, start: int, end: int) -> int:
        try:
            return self._keys.index(key, start, end)  # type: ignore[arg-type]
        except ValueError:
            return -1

    def _follow(self, sources: Sequence[Candidate], targets: Sequence[Candidate], leaving: Sequence[Candidate]) -> None:
        """Bring the records up to date."""
        workers = [*sources, *targets, *leaving]
        num_readers = len(workers) - len(leaving)
        if workers != self._workers or len(sources) != self._split or num_readers != self._num_readers:
            self._begin(workers, len(sources), num_readers)
        content, at = self._records.content, 0
        for worker, known in zip(workers, self._known, strict=True):
            standing = worker.latest or worker.standing()
            if standing is not known.standing:
                known.standing = standing
                _STANDING.pack_into(content, at, *standing)
            speed = worker.steps.coefficients
            if speed is not known.speed:
                known.speed = speed
                _SPEED.pack_into(content, at + _SPEED_AT, *speed)
            if worker.info is not known.info:
                known.info = worker.info
                self._write_info(at + _INFO_AT, worker.info)
            at += _WORKER_SIZE
        if self._links_version != self._transfers.version:
            self._links_version = self._transfers.version
            self._write_links()

    def _begin(self, workers: list[Candidate], split: int, num_readers: int) -> None:
        self._workers, self._split, self._num_readers = workers, split, num_readers
        self._keys = [worker.key for worker in workers]
        self._reader_keys = self._keys[:num_readers]
        self._names = [worker.name for worker in workers]
        self._known = [_Known() for _ in workers]
        self._fingerprints, self._kinships = {}, {}
        self._links_version = -1
        self._records = _Records(len(workers) * _WORKER_SIZE)
        self._asked = struct.Struct(f"{_ASKED}{num_readers + len(workers)}q")
        self._question = _Records(_ASKED_AT + self._asked.size)

    def _write_info(self, at: int, info: WorkerInfo) -> None:
        fingerprint = self._fingerprints.setdefault(info.fingerprint, len(self._fingerprints))
        kin = kinship(info)
        number = self._kinships.setdefault(kin, len(self._kinships)) if kin is not None else -1
        is_prefill = int(info.role is Role.PREFILL)
        fields = info.chunk_tokens, info.page_size, info.block_bytes, fingerprint, number, is_prefill
        _INFO.pack_into(self._records.content, at, *fields)

    def _write_links(self) -> None:
        table = self._transfers.table(self._keys)
        for at, row in enumerate(table.rows):
            _LINK.pack_into(self._records.content, at * _WORKER_SIZE + _LINK_AT, row)
        config, split = self._config, self._split
        self._links = table.links  # as long as its address is in use
        _FLEET.pack_into(
            self._question.content,
            0,
            self._records.address,
            self._links.ctypes.data,
            split,
            self._num_readers - split,
            len(self._workers) - self._num_readers,
            len(self._links),
            config.local_prefill_tokens,
            config.queue,
            config.prefill,
            config.transfer,
            config.itl,
            config.crowding,
            config.followers,
            config.affinity_s,
        )
        _PRICES.pack_into(self._question.content, _PRICES_AT, *table.others)
