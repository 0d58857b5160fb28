"""Reading the schedule that libtpu writes for a kernel: loops, cycles, use of units, DMAs, memory.

A bundle is what a TensorCore issues in one cycle; the listing after register allocation (`packed-bundles-post-ra`)
still shows its stalls, as empty bundles, so cycles are bundles. (The final listing has them folded into delays.)
A branch back closes a loop, whose body runs from the branch's target to the end of its delay slots; a branch forward
skips a region (`pl.when`). The per-bundle table of unit use lists the same bundles, row by row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

UNITS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
_SHORT = {"VLOAD:FILL": "FILL", "VSTORE:SPILL": "SPILL", "MXU": "MATMUL"}  # before 0.0.51 MXU counts MATPUSH as well
_DELAY_SLOTS = 4
_GRANULE_BYTES = 32
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*[A-Z ]*:")
_BRANCH = re.compile(r"sbr\.(?:rel|abs) (?:\((!?%p\w+)\) )?target bundleno = (\d+)")
_DMA = re.compile(r"(?:\{|;;) *%\w+ = (dma\.(?!done)[\w.]+) .*?/\*size_in_granules=\*/([%\w]+)")
_ALLOCATION = re.compile(r"#allocation\w+ \[.*?space=(vmem|smem), size = 0x([0-9a-f]+)")


_PROGRAM = "TLP"  # what calls the kernels, with the plain XLA operations around them


class ScheduleError(Exception):
    """A listing is not what this reader knows: libtpu has changed its format."""


@dataclass(frozen=True, slots=True)
class Dma:
    """One DMA instruction.

    Attributes:
        direction: "hbm_to_vmem", ...
        num_bytes: None where the size is known only at run time.
    """

    direction: str
    num_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a set of bundles does in one pass, all predicated regions counted as taken.

    Attributes:
        cycles: bundles, stalls included.
        stalls: empty ones.
        use: slots taken, by unit: those of `UNITS` that the compiler tells apart.
        vmatmuls: matrix products issued.
        dmas: started.
        waits: for DMAs.
        checks: bounds checks, each a conditional halt.
    """

    cycles: int
    stalls: int
    use: Mapping[str, int]
    vmatmuls: int
    dmas: tuple[Dma, ...]
    waits: int
    checks: int

    @property
    def spills(self) -> int:
        """Vector registers stored for want of room."""
        return self.use["SPILL"]

    @property
    def fills(self) -> int:
        """Vector registers loaded back."""
        return self.use["FILL"]


@dataclass(frozen=True, slots=True)
class Region:
    """Bundles that a branch may skip."""

    start: int
    stop: int
    predicate: str

    @property
    def cycles(self) -> int:
        """Saved when it is skipped."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """One loop of a kernel.

    Attributes:
        start: first bundle of the body.
        stop: bundle after its last one.
        depth: 0 is outermost.
        parent: index of the loop around it, in `Schedule.loops`; None at depth 0.
        own: what the body does without the loops in it.
        regions: skippable, of the body without the loops in it.
    """

    start: int
    stop: int
    depth: int
    parent: int | None
    own: Work
    regions: tuple[Region, ...]

    @property
    def body_cycles(self) -> int:
        """Of one pass with every inner loop passed once."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A compiled kernel.

    Attributes:
        name: of the kernel.
        cycles: bundles in all.
        capacity: slots per bundle, by unit.
        loops: in order of their first bundle, outer before inner.
        outside: what runs once.
        vmem_bytes: allocated.
        smem_bytes: allocated.
    """

    name: str
    cycles: int
    capacity: Mapping[str, int]
    loops: tuple[Loop, ...]
    outside: Work
    vmem_bytes: int
    smem_bytes: int

    def occupancy(self, work: Work) -> dict[str, float]:
        """Share of each unit's slots that is taken, 0 to 1."""
        return {unit: work.use[unit] / (slots * max(work.cycles, 1)) for unit, slots in self.capacity.items()}

    def hot_loop(self) -> Loop | None:
        """The innermost loop with most matrix products (most cycles where no loop has any)."""
        return max(self.loops, key=lambda loop: (loop.own.vmatmuls, loop.own.cycles), default=None)


@dataclass(frozen=True, slots=True)
class _Bundle:
    text: str
    use: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Branch:
    address: int
    target: int
    predicate: str


def read_schedules(directory: Path) -> list[Schedule]:
    """Every kernel whose schedule lies in a dump directory, in the order of their compilation.

    Plain XLA operations, and the program that calls kernels, are left out.

    Raises:
        ScheduleError: a file is missing, or is not in the known format.
    """
    found = []
    for listing in sorted(directory.glob("*-packed-bundles-post-ra.txt")):
        stem = re.fullmatch(r"(\d+-(.+))-\d+-packed-bundles-post-ra\.txt", listing.name)
        if stem is None or stem[2].startswith("<") or stem[2] == _PROGRAM:
            continue
        found.append(_read(listing, stem[1], stem[2]))
    return found


def _read(listing: Path, stem: str, name: str) -> Schedule:
    capacity, use = _read_use(_only(listing.parent, f"{stem}-*-pre-delay_hlo-static-per-bundle-utilization.txt"))
    lines = [line for line in listing.read_text().splitlines() if _BUNDLE.match(line)]
    addresses = [int(_match(_BUNDLE, line)[1], 16) for line in lines]
    if addresses != list(range(len(lines))) or len(use) != len(lines):
        raise ScheduleError(f"{listing}: {len(lines)} bundles but {len(use)} rows of unit use")
    bundles = [_Bundle(line.split(":", 1)[1], row) for line, row in zip(lines, use, strict=True)]
    memory = _read_memory(_only(listing.parent, f"{stem}-*-post-delay-converter.txt"))
    loops, outside = _find_loops(bundles, tuple(capacity))
    return Schedule(
        name=name,
        cycles=len(bundles),
        capacity=capacity,
        loops=loops,
        outside=outside,
        vmem_bytes=memory["vmem"],
        smem_bytes=memory["smem"],
    )


def _only(directory: Path, pattern: str) -> Path:
    files = sorted(directory.glob(pattern))
    if not files:
        raise ScheduleError(f"{directory} has no {pattern}")
    return files[0]


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.search(text)
    assert found is not None
    return found


def _read_use(path: Path) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    lines = path.read_text().splitlines()
    numbers = [tuple(int(field) for field in line.split()) for line in lines if re.fullmatch(r"[\d\s]*\d\s*", line)]
    header = next((line for line in lines if "VALU," in line), "")
    units = [_SHORT.get(name, name) for name in header.split(", ")]
    if not {"MATMUL", "FILL", "SPILL"} <= set(units) <= set(UNITS) or {len(units)} != set(map(len, numbers)):
        raise ScheduleError(f"{path}: columns are {header!r}")
    return dict(zip(units, numbers[0], strict=True)), numbers[1:]


def _read_memory(path: Path) -> dict[str, int]:
    sizes = {"vmem": 0, "smem": 0}
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("#allocation") and (found := _ALLOCATION.search(line)):
            sizes[found[1]] += int(found[2], 16)
    return sizes


def _find_loops(bundles: Sequence[_Bundle], units: Sequence[str]) -> tuple[tuple[Loop, ...], Work]:
    branches = [
        _Branch(address, int(found[2]), found[1] or "")
        for address, bundle in enumerate(bundles)
        for found in [_BRANCH.search(bundle.text)]
        if found
    ]
    ends: dict[int, int] = {}
    for branch in branches:
        if branch.target <= branch.address:
            stop = min(branch.address + 1 + _DELAY_SLOTS, len(bundles))
            ends[branch.target] = max(stop, ends.get(branch.target, 0))
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
    owner = [-1] * len(bundles)
    for index, (start, stop) in enumerate(spans):  # inner loops start later, and so overwrite
        owner[start:stop] = [index] * (stop - start)
    loops = []
    for index, (start, stop) in enumerate(spans):
        around = [i for i, (first, last) in enumerate(spans) if first <= start and stop <= last and i != index]
        parent = max(around, key=lambda i: spans[i][0], default=None)
        regions = tuple(
            Region(branch.address + 1 + _DELAY_SLOTS, branch.target, branch.predicate)
            for branch in branches
            if owner[branch.address] == index and branch.target > branch.address + 1 + _DELAY_SLOTS
        )
        own = _work([bundle for bundle, holder in zip(bundles, owner, strict=True) if holder == index], units)
        loops.append(Loop(start=start, stop=stop, depth=len(around), parent=parent, own=own, regions=regions))
    outside = _work([bundle for bundle, holder in zip(bundles, owner, strict=True) if holder == -1], units)
    return tuple(loops), outside


def _work(bundles: Sequence[_Bundle], units: Sequence[str]) -> Work:
    use: Counter[str] = Counter()
    dmas = []
    stalls = vmatmuls = waits = checks = 0
    for bundle in bundles:
        use.update(dict(zip(units, bundle.use, strict=True)))
        if not any(bundle.use) and re.fullmatch(r"[\s>]*\{\s*\}.*", bundle.text):
            stalls += 1
            continue
        vmatmuls += bundle.text.count(" vmatmul")
        waits += bundle.text.count("dma.done.wait")
        checks += bundle.text.count("shalt.err")
        for found in _DMA.finditer(bundle.text):
            size = int(found[2]) * _GRANULE_BYTES if found[2].isdigit() else None
            dmas.append(Dma(found[1].removeprefix("dma."), size))
    return Work(
        cycles=len(bundles),
        stalls=stalls,
        use={unit: use[unit] for unit in units},
        vmatmuls=vmatmuls,
        dmas=tuple(dmas),
        waits=waits,
        checks=checks,
    )
