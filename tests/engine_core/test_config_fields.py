import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.config import CacheConfig, EngineConfig
from engine_core.config_loader import FieldHelp, field_help, from_dict, load, to_dict
from engine_core.errors import ConfigError
from engine_core.types import Numerics
from tests.engine_core.config_example import ALIASES, Inner, Level, Outer

LABELS = st.none() | st.text().filter(lambda text: text.lower() != "none")
OUTERS = st.builds(
    Outer,
    inner=st.builds(
        Inner,
        ratio=st.floats(allow_nan=False),
        names=st.lists(st.text("abc", min_size=1), max_size=3).map(tuple),
        span=st.tuples(st.integers(), st.integers()),
        limit=st.none() | st.integers(),
    ),
    engine=st.builds(
        EngineConfig,
        cache=st.builds(CacheConfig, page_size=st.integers(0, 999)),
        numerics=st.sampled_from(Numerics),
        prefix_cache=st.booleans(),
    ),
    path=st.sampled_from([Path("/a"), Path("b/c")]),
    level=st.sampled_from(Level),
    mode=st.sampled_from(["x", "y"]),
    no_wait=st.booleans(),
    label=LABELS,
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    text=st.text(),
    plain=st.integers(),
)


@settings(deadline=None)
@given(OUTERS)
def test_to_dict_and_back(config):
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


@settings(deadline=None)
@given(OUTERS)
def test_help_prints_defaults_as_flags_that_mean_them(config):
    @dataclass(frozen=True)
    class Local:
        outer: object = config

    Local.__annotations__["outer"] = Outer
    argv = [f"--{help_.name}={help_.default}" for help_ in field_help(Local)]
    assert load(Outer, [flag.replace("--outer.", "--") for flag in argv]) == config


def test_help_takes_types_defaults_and_comments_from_the_source():
    helps = {help_.name: help_ for help_ in field_help(Outer)}
    assert helps["inner.ratio"] == FieldHelp(name="inner.ratio", type="float", default="0.25", comment="share")
    assert helps["text"].comment == "a comment behind a value"
    assert helps["plain"].comment == ""
    assert (helps["level"].type, helps["mode"].type, helps["sizes"].type) == ("1|2", "x|y", "int,...")
    assert (helps["inner.limit"].type, helps["inner.limit"].default) == ("int|none", "none")
    assert helps["engine.cache.page_size"].comment.startswith("tokens per page")
    assert helps["engine.model.dtype"].comment.startswith("auto | float32")


def test_unsupported_types_are_our_bug():
    @dataclass(frozen=True)
    class Bad:
        mapping: object = None

    Bad.__annotations__["mapping"] = dict[str, int]
    with pytest.raises(TypeError, match="no type of a configuration field"):
        load(Bad, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
NAMES = [help_.name for help_ in field_help(Outer)]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "inner", "engine", "x"]), JSON, max_size=4))
def test_any_mapping_gives_a_config_or_a_config_error(mapping):
    try:
        config = from_dict(Outer, mapping)
    except ConfigError:
        return
    assert from_dict(Outer, to_dict(config)) == config


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([f"--{name}" for name in NAMES]) | st.sampled_from(NAMES) | st.text(max_size=8), max_size=6
    )
)
def test_any_flags_give_a_config_or_a_config_error(argv):
    try:
        config = load(Outer, argv, aliases=ALIASES)
    except ConfigError:
        return
    assert from_dict(Outer, to_dict(config)) == config


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_file_gives_a_config_or_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_text(text, encoding="utf-8", newline="", errors="surrogatepass")
    try:
        assert load(Outer, [], path) == Outer()
    except ConfigError as error:
        assert str(path) in str(error)
