"""The scanner of positions walks hjson's grammar: it must see exactly the keys that hjson's parser sees."""

from __future__ import annotations

import hjson
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from ds_fp8.config.positions import locate


def paths(value, path=()):
    """Every path of a parsed value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "b": {"c": [1, {"d": 2}]}}',
        '{a: 1 # c\n b: 5e8, c:true, d: trueish\n e: "x",}',
        "a: 1\nb: [1,2\n3]",
        "{a: '''x\n y: 1''', b: 2}",
        "{'a b': 'x', \"c\": -0.5e-3 // y: 1\n d: null /* z: 2 */ e: false}",
        "\ufeff{ a: no quotes: here, and # there\n b: 1}",
        "{a: [], b: {}, c: [[], {}]}",
        "// head\n# more\n/* and { more: 1 } */\nfp8: {enabled: true}\n",
        '{"a": "x \\" # not a comment", "b": 1}',
        "{a:NaN, b:Infinity\n c: .5 \n d: 0x1 \n e: 07\n}",
    ],
)
def test_sees_what_hjson_sees(text):
    assert set(locate(text).keys) == set(paths(hjson.loads(text)))


def test_lines_and_columns_count_from_one():
    found = locate('{\n  "fp8": {"enabled": true,\n    "margin": [1, 2]}\n}')
    assert found.find(("fp8",)) == (2, 3)
    assert found.find(("fp8", "enabled")) == (2, 11)
    assert found.find(("fp8", "margin", 1)) == (3, 19)


def test_a_missing_key_is_placed_at_its_section():
    found = locate('{\n  "fp8": {}}')
    assert found.find(("fp8", "enabled")) == (2, 3)
    assert found.find(("msamp",)) == (1, 1)


@pytest.mark.parametrize("text", ["", "{", '{"a": [1,', "{a", "[", "{]", "nonsense", '{"a": "unclosed', "{a: '''x"])
def test_broken_text_never_raises(text):
    locate(text)


baseline = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
)
names = st.text(st.characters(codec="utf-8", exclude_characters='"\\'), min_size=1, max_size=6).filter(str.isprintable)
trees = st.recursive(
    baseline, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, trees, max_size=5), st.booleans())
def test_same_as_hjson_on_random_files(data, as_json):
    """Written by hjson itself in both of its styles, with every kind of value."""
    text = hjson.dumpsJSON(data, indent=2) if as_json else hjson.dumps(data)
    try:
        parsed = hjson.loads(text)
    except hjson.HjsonDecodeError:  # hjson 3.1.0 writes some strings that it cannot read
        reject()
    assert set(locate(text).keys) == set(paths(parsed))
