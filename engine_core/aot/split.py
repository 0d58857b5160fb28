"""In how many parts a model is split over the devices of a slice. Host arithmetic.

The tensor axis takes heads, so it is as large as the number of KV heads allows; what devices remain are row shards,
which have sequences of their own: of the expert axis where the model has experts, else of the data axis. Only where the
weights do not fit so is the tensor axis made larger, with copies of KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine_core.config import Degrees
from engine_core.errors import ConfigError
from engine_core.mesh import kv_copies

FLAGS = ("--tp", "--ep", "--dp")


@dataclass(frozen=True, slots=True)
class AskedDegrees:
    """What the user decided; None is left to `choose_splits`."""

    tp: int | None = None
    ep: int | None = None
    dp: int | None = None

    def __str__(self) -> str:
        given = zip(FLAGS, (self.tp, self.ep, self.dp), strict=True)
        return " ".join(f"{flag} {degree}" for flag, degree in given if degree is not None)

    def allows(self, degrees: Degrees) -> bool:
        """Whether they agree with everything asked."""
        pairs = ((self.tp, degrees.tp), (self.ep, degrees.ep), (self.dp, degrees.dp))
        return all(asked in (None, degree) for asked, degree in pairs)


def choose_splits(
    num_kv_heads: int, num_devices: int, asked: AskedDegrees, check: Callable[[Degrees], object]
) -> list[Degrees]:
    """The splits over all devices that are worth a try, the best first.

    A split that keeps one copy of each KV head and splits the heads less than it could is left out unless asked for:
    it holds more weights and the same KV.

    Args:
        num_kv_heads: K.
        num_devices: of the slice.
        asked: what the user decided.
        check: raises ConfigError where degrees do not divide the model.

    Raises:
        ConfigError: there is none; it names what was asked for and the size of the model that stands against it.
    """
    counts = range(1, num_devices + 1)
    triples = (
        Degrees(tp=tp, ep=ep, dp=num_devices // (tp * ep))
        for tp in counts
        if num_devices % tp == 0
        for ep in counts
        if num_devices // tp % ep == 0
    )
    allowed = [degrees for degrees in triples if asked.allows(degrees)]
    if not allowed:
        raise ConfigError(f"{asked}: no split of that kind takes {num_devices} devices")
    possible, problems = [], []
    for degrees in allowed:
        try:
            check(degrees)
        except ConfigError as error:
            problems.append(str(error))
        else:
            possible.append(degrees)
    if not possible:
        raise ConfigError(f"{asked or 'every split'}: {problems[-1]}")
    possible.sort(key=lambda degrees: _rank(num_kv_heads, degrees))
    best: dict[int, Degrees] = {}
    for degrees in possible:
        best.setdefault(kv_copies(num_kv_heads, degrees.tp), degrees)
    return list(best.values())


def _rank(num_kv_heads: int, degrees: Degrees) -> tuple[int, int, int]:
    """Few copies of KV heads, then many parts of the heads, then few copies of the experts."""
    return kv_copies(num_kv_heads, degrees.tp), -degrees.tp, degrees.dp
