import json

import pytest

from deploy.cli import main
from deploy.replay import build_parser
from router.simulator.synthesis import Shape, synthesize
from router.simulator.trace import read_trace, write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "trace.jsonl"
    write_trace(synthesize(Shape(requests=120, rate_rps=3.0), 0), path)
    return str(path)


def test_json_has_what_scripts_read(trace, capsys):
    flags = ["--policy", "joint", "--policy", "round-robin", "--prefill", "2", "--decode", "2", "--load", "0.8"]
    assert main(["replay", "--trace", trace, *flags, "--json", "--jobs", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["policies"]) == ["joint", "round-robin"]
    for outcome in result["policies"].values():
        for key in ("goodput_rps", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "hit_ratio"):
            assert outcome[key] > 0
    assert result["policies"]["joint"]["hit_ratio"] > result["policies"]["round-robin"]["hit_ratio"]
    assert result["policies"]["joint"]["hit_ratio"] <= result["ideal_hit_ratio"]
    assert result["load"] == pytest.approx(0.8)
    assert result["offered_rps"] == pytest.approx(0.8 * result["capacity_rps"])


def test_table_and_page(trace, capsys, tmp_path):
    page = tmp_path / "page.html"
    flags = ["--load", "0.5", "--load", "1.0", "--policy", "joint", "--plot", str(page)]
    assert main(["replay", "--trace", trace, *flags]) == 0
    out = capsys.readouterr().out
    assert "load 0.50" in out
    assert "load 1.00" in out
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "http" not in text


def test_ablation_runs_each_term(trace, capsys):
    assert main(["replay", "--trace", trace, "--ablate", "--requests", "30", "--json", "--jobs", "1"]) == 0
    names = list(json.loads(capsys.readouterr().out)["policies"])
    assert names[0] == "joint"
    assert "joint without transfer" in names
    assert len(names) == 9


def test_planner_beside_fixed_fleets(trace, capsys):
    flags = ["--planner", "--static", "--budget", "3", "--start-s", "15", "--jobs", "1"]
    assert main(["replay", "--trace", trace, *flags, "--advise", "--prefill", "2", "--decode", "1"]) == 0
    out = capsys.readouterr().out
    assert "fixed 1P1D: " in out
    assert "smallest fixed fleet: 1P1D" in out
    assert "2P1D -> " in out
    assert main(["replay", "--trace", trace, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["planner"]["slice_hours"] > 0
    assert result["static"][-1]["windows_met"] >= 0.95


def test_synthesize(tmp_path, capsys):
    path = tmp_path / "new.jsonl"
    assert main(["replay", "--synthesize", str(path), "--requests", "40", "--turns", "2"]) == 0
    assert len(read_trace(path, 512, 0).requests) == 40
    assert "40 requests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "--trace FILE is needed"),
        (["--trace", "/absent"], "--trace /absent"),
        (["--slow", "prefill-9=2"], "no worker prefill-9"),
        (["--profile", "/absent"], "--profile /absent"),
        (["--prefill", "0"], "--prefill 0"),
    ],
)
def test_bad_flags_are_named(trace, flags, text, capsys):
    given = flags if flags[:1] == ["--trace"] or not flags else ["--trace", trace, *flags]
    assert main(["replay", *given]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--load", "0"], ["--policy", "best"], ["--lose-events", "2"], ["--decode", "0"]])
def test_values_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(flags)
    assert flags[0] in capsys.readouterr().err
