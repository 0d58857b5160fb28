from pathlib import Path

import pytest

from engine_core.config import CacheConfig, EngineConfig
from engine_core.config_loader import FieldHelp, field_help, from_dict, load, to_dict
from engine_core.errors import ConfigError
from engine_core.types import Numerics
from tests.engine_core.config_example import ALIASES, Deep, Inner, Level, Needs, Outer, Root


def write(tmp_path, text):
    path = tmp_path / "baton.toml"
    path.write_text(text)
    return path


def refused(argv=(), toml_path=None, cls=Outer):
    with pytest.raises(ConfigError) as caught:
        load(cls, list(argv), toml_path, ALIASES if cls is Outer else None)
    return str(caught.value)


def test_nothing_given_is_the_defaults():
    assert load(Outer, []) == Outer()
    assert load(EngineConfig, []) == EngineConfig()


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(tmp_path, "plain = 1\nsizes = [3]\n[engine.cache]\npage_size = 64\nnum-pages = 5")
    config = load(Outer, ["--engine.cache.page_size", "32"], path)
    assert (config.plain, config.sizes) == (1, (3,))
    assert config.engine.cache == CacheConfig(page_size=32, num_pages=5)


def test_a_config_flag_takes_the_place_of_the_file(tmp_path):
    path = write(tmp_path, "plain = 1")
    assert load(Outer, ["--config", str(path)], "/nowhere.toml").plain == 1
    assert load(Outer, [f"--config={path}", "--plain", "2"]).plain == 2


def test_a_section_keeps_what_its_owner_set_as_default():
    assert load(Outer, ["--inner.limit", "3"]).inner == Inner(ratio=0.25, names=("a",), limit=3)


def test_defaults_two_sections_down_are_kept():
    config = load(Deep, ["--outer.engine.cache.num_pages", "3"])
    assert config.outer.engine.cache == CacheConfig(page_size=7, num_pages=3)


def test_computed_fields_are_no_configuration():
    assert refused(["--computed", "1"], cls=Deep).startswith("unknown flag --computed")
    assert "computed" not in to_dict(Deep())


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--inner.ratio", "2"], "inner.ratio", 2.0),
        (["--inner.ratio", "-1e3"], "inner.ratio", -1000.0),
        (["--inner.names", "b, c"], "inner.names", ("b", "c")),
        (["--inner.names="], "inner.names", ()),
        (["--inner.span=3,4"], "inner.span", (3, 4)),
        (["--inner.limit", "7", "--inner.limit", "none"], "inner.limit", None),
        (["--label", "none"], "label", None),
        (["--label", "x"], "label", "x"),
        (["--path", "/x"], "path", Path("/x")),
        (["--level", "2"], "level", Level.HIGH),
        (["--mode", "y"], "mode", "y"),
        (["--plain", "1_000"], "plain", 1000),
        (["--plain", "-5"], "plain", -5),
        (["--text=--odd=1"], "text", "--odd=1"),
        (["--text="], "text", ""),
        (["--no-wait"], "no_wait", True),
        (["--no_wait", "--no-no-wait"], "no_wait", False),
        (["--no-wait", "off"], "no_wait", False),
        (["--engine.prefix_cache", "false"], "engine.prefix_cache", False),
        (["--no-engine.prefix-cache"], "engine.prefix_cache", False),
        (["--engine.prefix-cache=No"], "engine.prefix_cache", False),
        (["--no-prefix_cache"], "engine.prefix_cache", False),
        (["--engine.numerics", "strict"], "engine.numerics", Numerics.STRICT),
        (["--model", "dir"], "engine.model.path", "dir"),
        (["--model.dtype", "float32"], "engine.model.dtype", "float32"),
        (["--max_model_len", "9"], "engine.batch.max_model_len", 9),
        (["--max-model-len=9"], "engine.batch.max_model_len", 9),
    ],
)
def test_flags(argv, name, value):
    found = load(Outer, argv, aliases=ALIASES)
    for part in name.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plain", "x"], "plain must be an integer, not 'x'"),
        (["--plain", "1.5"], "plain must be an integer, not '1.5'"),
        (["--plain", ""], "plain must be an integer, not ''"),
        (["--plain"], "--plain needs a value: plain must be an integer"),
        (["--plain", "--no-wait"], "--plain needs a value: plain must be an integer"),
        (["--inner.ratio", "nan"], "inner.ratio must be a number, not 'nan'"),
        (["--inner.span", "1"], "inner.span must be a list of an integer, then an integer, not '1'"),
        (["--inner.limit", "x"], "inner.limit must be an integer or none, not 'x'"),
        (["--sizes", "1,,2"], "sizes must be a list of which each is an integer, not '1,,2'"),
        (["--level", "3"], "level must be one of 1, 2, not '3'"),
        (["--numerics", "slow"], "engine.numerics must be one of fast, strict, not 'slow'"),
        (["--no-wait", "maybe"], "no_wait must be true or false, not 'maybe'"),
        (["--no-no-wait=1"], "--no-no-wait takes no value, but was given '1'"),
        (["--no-plain"], "unknown flag --no-plain; did you mean --plain?"),
        (
            ["--engine.cache.page_sise", "1"],
            "unknown flag --engine.cache.page_sise; did you mean --engine.cache.page_size?",
        ),
        (["--cache.page_sise", "1"], "unknown flag --cache.page_sise; did you mean --cache.page_size?"),
        (
            ["--inner", "1"],
            "--inner is a section; its flags are --inner.ratio, --inner.names, --inner.span, --inner.limit",
        ),
        (["plain"], "unexpected argument 'plain'; flags look like --name VALUE"),
        (["-p", "1"], "unexpected argument '-p'; flags look like --name VALUE"),
        (["--"], "unexpected argument '--'; flags look like --name VALUE"),
        (["--tp", "0"], "tp must be at least 1, not 0"),
    ],
)
def test_refused_flags(argv, message):
    assert refused(argv) == message


def test_an_unknown_flag_far_from_all_lists_what_is_known():
    assert refused(["--zzz"], cls=Root) == "unknown flag --zzz; known are --needs.port, --needs.host"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain = '1'", "plain must be an integer, not '1'"),
        ("plain = true", "plain must be an integer, not True"),
        ("plain = 1.0", "plain must be an integer, not 1.0"),
        ("no_wait = 1", "no_wait must be true or false, not 1"),
        ("text = 1", "text must be a string, not 1"),
        ("level = true", "level must be one of 1, 2, not True"),
        ("sizes = 1", "sizes must be a list of which each is an integer, not 1"),
        ("sizes = [1, 'a']", "sizes must be a list of which each is an integer, not [1, 'a']"),
        ("inner = 1", "inner is a section with the fields inner.ratio, inner.names, inner.span, inner.limit, not 1"),
        ("[inner]\nratio = nan", "inner.ratio must be a number, not nan"),
        (f"[inner]\nratio = 1{'0' * 400}", f"inner.ratio must be a number, not 1{'0' * 400}"),
        ("[inner]\nrati = 1", "unknown field inner.rati; did you mean inner.ratio?"),
        ("[inner]\nzzz = 1", "unknown field inner.zzz; known are inner.ratio, inner.names, inner.span, inner.limit"),
        ("[plain]\nx = 1", "plain must be an integer, not {'x': 1}"),
        ("no-wait = true\nno_wait = true", "no_wait is given twice"),
        ("model = 'x'", "unknown field model; did you mean mode?"),
    ],
)
def test_refused_files_name_file_and_field(tmp_path, text, message):
    path = write(tmp_path, text)
    assert refused(toml_path=path) == f"{path}: {message}"


def test_files_that_are_no_toml_are_refused(tmp_path):
    assert refused(toml_path=tmp_path / "none") == f"configuration file {tmp_path}/none: No such file or directory"
    assert "Is a directory" in refused(toml_path=tmp_path)
    assert refused(toml_path=write(tmp_path, "plain = 1\ntext x")).endswith("(at line 2, column 6)")
    assert "configuration file" in refused(toml_path=write(tmp_path, "a = " + "[" * 100_000))
    (tmp_path / "bytes").write_bytes(b"text = '\xff'")
    assert "utf-8" in refused(toml_path=tmp_path / "bytes")


def test_required_fields():
    assert load(Root, ["--needs.port", "1"]) == Root(needs=Needs(port=1))
    assert refused(cls=Root) == "needs.port is required"
    assert refused(["--needs.host", "x"], cls=Root) == "needs.port is required"
    assert field_help(Root)[0] == FieldHelp(name="needs.port", type="int", default=None, comment="")


def test_from_dict_checks_too():
    assert from_dict(Outer, {}) == Outer()
    assert from_dict(Outer, {"inner": {"limit": None}}) == Outer()
    for mapping, message in [
        ({"plain": None}, "plain must be an integer, not None"),
        ({1: 2}, "unknown field 1"),
        ({"inner": None}, "inner is a section"),
    ]:
        with pytest.raises(ConfigError, match=message):
            from_dict(Outer, mapping)
