import io

from deploy.fleet_types import FleetStatus, MemberState, MemberStatus
from deploy.progress import Progress
from engine_core.types import Role


def status(*members: tuple[str, MemberState, str], events: tuple[str, ...] = (), num_events: int = 0) -> FleetStatus:
    return FleetStatus(
        version=1,
        ready=False,
        fatal=None,
        fatal_is_config=False,
        wanted={},
        members=tuple(MemberStatus(name, Role.DECODE, 1, state, text, 1, None, None) for name, state, text in members),
        events=events,
        num_events=num_events,
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_few_where_they_cannot_be_overwritten() -> None:
    out = io.StringIO()
    progress = Progress(out, io.StringIO())
    for bucket in range(6):
        progress.starting(status(("decode-0", MemberState.STARTING, f"compiling {bucket}/6 buckets")))
    progress.starting(status(("decode-0", MemberState.STARTING, "loading weights 40 %")))
    progress.starting(status(("decode-0", MemberState.READY, "")))
    assert out.getvalue() == "decode-0: compiling 0/6 buckets\ndecode-0: loading weights 40 %\n"


def test_a_terminal_has_one_line_that_changes() -> None:
    out, result = Terminal(), io.StringIO()
    progress = Progress(out, result)
    for bucket in range(2):
        text = f"compiling {bucket}/6 buckets"
        progress.starting(status(("a", MemberState.STARTING, text), ("b", MemberState.WAITING, "")))
    progress.ready("Ready")
    assert out.getvalue() == (
        "a: compiling 0/6 buckets | b: waiting\r\x1b[2Ka: compiling 1/6 buckets | b: waiting\r\x1b[2K"
    )
    assert result.getvalue() == "Ready\n"


def test_each_event_is_told_once_even_when_many_came_at_a_time() -> None:
    out = io.StringIO()
    progress = Progress(out, io.StringIO())
    progress.running(status(events=("one", "two"), num_events=2))
    progress.running(status(events=("two", "three"), num_events=3))
    progress.running(status(events=("two", "three"), num_events=3))
    progress.running(status(events=("eight", "nine"), num_events=9))
    assert out.getvalue().split() == ["one", "two", "three", "eight", "nine"]
