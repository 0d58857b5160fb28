"""Donors: workers that could hand cached leading blocks of a prompt to the prefill worker that is to read it.

A donor is chosen by what workers have said that they hold. What is only predicted will not be there yet.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from engine_core.messages import WorkerInfo
from engine_core.types import Role
from router.candidate import Candidate

Kinship = tuple[str, str, int]


class Donor(NamedTuple):
    """A worker, and how many leading tokens of the prompt it has said that it holds."""

    worker: Candidate
    held: int


def kinship(info: WorkerInfo) -> Kinship | None:
    """Workers of one kinship can fetch from each other; None: it neither donates nor fetches."""
    address = info.address
    if not info.block_namespace or not address.kv_port or address.kv_shards:  # shards: of a worker of several hosts
        return None
    return info.fingerprint, info.block_namespace, info.page_size


def rank_donors(workers: Iterable[Candidate], told: Mapping[Hashable, int]) -> list[Donor]:
    """Those that hold anything, the longest match first.

    Of equals decode workers first, whose network interfaces send nothing else, then the one that waited longest.
    """
    donors = [Donor(worker, held) for worker in workers if (held := told.get(worker.key, 0))]
    donors.sort(key=lambda donor: (-donor.held, donor.worker.info.role is Role.PREFILL, donor.worker.turn))
    return donors


def find_donor(reader: Candidate, held: int, num_tokens: int, donors: Sequence[Donor]) -> tuple[Candidate, int] | None:
    """The best donor for a worker that holds `held` leading tokens, and how many tokens it would fetch.

    Returns:
        None where nobody holds a block more than the reader.
    """
    kin, page_size = kinship(reader.info), reader.info.page_size
    if kin is None:
        return None
    most = (num_tokens - 1) // page_size * page_size  # the last token is computed, for its logits
    for worker, told in donors:
        fetched = min(told, most) - held
        if fetched < page_size:
            return None
        if worker is not reader and kinship(worker.info) == kin:
            return worker, fetched
    return None
