"""Dataclasses from YAML and the command line."""

from dataclasses import dataclass, field

import pytest

from dpkernels.training.settings import (
    build,
    load_yaml,
    merge,
    nest,
    parse_override,
    plain,
)


@pytest.mark.parametrize("text", ["training.steps", "=3", "a=[1"])
def test_faulty_overrides_are_refused(text):
    with pytest.raises(ValueError, match="--set"):
        parse_override(text)


def test_faulty_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a mapping, found list"):
        load_yaml(tmp_path / "run.yaml")


def test_the_value_of_an_override_is_yaml_and_numbers_are_numbers():
    assert parse_override("a.b=[1, x]") == {"a": {"b": [1, "x"]}}
    assert parse_override("a=1e-5") == {"a": 1e-5}
    assert parse_override("a=") == {"a": None}
    assert nest("a.b.c", 3) == {"a": {"b": {"c": 3}}}


def test_a_change_lies_over_a_block_unless_it_has_another_target():
    base = {"loss": {"_target_": "A", "x": 1, "y": {"z": 2}}, "kept": 1}
    assert merge(base, {"loss": {"y": {"w": 3}}}) == {
        "loss": {"_target_": "A", "x": 1, "y": {"z": 2, "w": 3}},
        "kept": 1,
    }
    assert merge(base, {"loss": {"_target_": "B"}}) == {"loss": {"_target_": "B"}, "kept": 1}
    assert base["loss"]["y"] == {"z": 2}, "the base is left as it is"


@dataclass(frozen=True)
class Inner:
    count: int = 1
    share: float = 0.5
    names: tuple[str, ...] = ()
    on: bool = False
    limit: float | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    block: dict = field(default_factory=dict)


def test_values_take_the_type_of_their_setting():
    values = {"count": 3.0, "share": 1, "names": ["a", "b"], "on": True, "limit": "1e-3"}
    inner = build(Outer, {"inner": values}, "").inner
    assert inner == Inner(3, 1.0, ("a", "b"), True, 1e-3)
    assert isinstance(inner.count, int)
    assert isinstance(inner.share, float)
    assert build(Outer, {"inner": {"limit": None}}, "").inner.limit is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iner": {}}, "unknown setting iner; did you mean inner?"),
        ({"xyz": {}}, "unknown setting xyz; expected one of inner, block"),
        ({"inner": {"cuont": 1}}, "unknown setting inner.cuont; did you mean count?"),
        ({"inner": 3}, "inner must be a mapping, got 3"),
        ([], r"configuration must be a mapping, got \[\]"),
        ({"inner": {"count": 1.5}}, "inner.count must be a value of type int; got 1.5"),
        ({"inner": {"count": True}}, "inner.count must be a value of type int; got True"),
        ({"inner": {"on": 1}}, "inner.on must be a value of type bool; got 1"),
        ({"inner": {"names": "a"}}, "inner.names must be a list; got 'a'"),
        ({"inner": {"names": ["a", 2]}}, r"inner.names\[1\] must be a value of type str; got 2"),
        ({"block": 1}, "block must be a value of type dict; got 1"),
    ],
)
def test_faulty_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        build(Outer, values, "")


def test_plain_values_have_lists_for_tuples():
    assert plain({"a": (1, (2, {"b": ()}))}) == {"a": [1, [2, {"b": []}]]}
