"""One request in the simulated cluster, and what each attempt at it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine_core.types import Request

if TYPE_CHECKING:
    from router.simulator.decode import DecodeWorker
    from router.simulator.policies import Placed
    from router.simulator.prefill import PrefillWorker
    from router.simulator.worker import Worker


class Job:
    """A request from its arrival to its last token.

    Attributes:
        number: position in the trace.
        num_prompt: tokens of the prompt.
        num_output: tokens that it will generate.
        hashes: of the prompt's full blocks.
        generated: tokens that reached the gateway in earlier attempts or in this one.
        first_token_at, last_token_at: when the gateway had them; negative before.
        cached_tokens: prompt tokens that whoever read the prompt held (first attempt).
        fetched_tokens: of these, those that had come from a donor.
        num_attempts: placements.
        attempt: the running one.
    """

    __slots__ = (
        "arrival_s",
        "attempt",
        "cached_tokens",
        "fetched_tokens",
        "first_token_at",
        "generated",
        "hashes",
        "last_token_at",
        "num_attempts",
        "num_output",
        "num_prompt",
        "number",
        "refused",
    )

    def __init__(
        self, number: int, arrival_s: float, num_prompt: int, num_output: int, hashes: Sequence[bytes]
    ) -> None:
        self.number = number
        self.arrival_s = arrival_s
        self.num_prompt = num_prompt
        self.num_output = num_output
        self.hashes = hashes
        self.generated = 0
        self.first_token_at = -1.0
        self.last_token_at = -1.0
        self.cached_tokens = 0
        self.fetched_tokens = 0
        self.num_attempts = 0
        self.attempt: Attempt | None = None
        self.refused = False

    @property
    def mean_itl_s(self) -> float:
        """Seconds per token behind the first."""
        return (self.last_token_at - self.first_token_at) / (self.num_output - 1) if self.num_output > 1 else 0.0


class Attempt:
    """One placement of a job.

    Attributes:
        num_tokens: prompt and what earlier attempts generated.
        left: tokens to generate.
        placed: the router's reservation.
        request: what the router was asked to place.
        source, target: who reads the prompt (None: the target), who generates.
        donor: who may have the prompt's first `donor_blocks` blocks for the source; None: nobody.
        fetched: block indices that came from it.
        over: ended, in whatever way; messages still under way find it so.
        num_granted: block indices below are not wanted by the target; -1 before its ticket has arrived.
        came_at: when the target had its message; negative before.
        prefilled_at: when its prompt had been read; negative before.
    """

    __slots__ = (
        "came_at",
        "donor",
        "donor_blocks",
        "fetched",
        "job",
        "left",
        "num_granted",
        "num_tokens",
        "over",
        "placed",
        "prefilled_at",
        "request",
        "source",
        "target",
    )

    def __init__(self, job: Job, request: Request, placed: Placed) -> None:
        self.job = job
        self.request = request
        self.placed = placed
        self.num_tokens = job.num_prompt + job.generated
        self.left = job.num_output - job.generated
        self.source: PrefillWorker | None = None
        self.target: DecodeWorker | None = None
        self.donor: Worker | None = None
        self.donor_blocks = 0
        self.fetched = range(0)
        self.over = False
        self.num_granted = -1
        self.came_at = -1.0
        self.prefilled_at = -1.0
