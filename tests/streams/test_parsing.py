"""The fast parser and the fast encoder against the slow and strict ones: the same rows, bytes, refusals."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

import jsonlines
import pytest

from srlm_cli.streams import reader, writer

LINES = [
    rb'{"a": 1, "a": 2}', rb'{"b": 1, "a": 2}', rb'{"a": -0}', rb'{"a": -0.0}', rb'{"a": 1.0}', rb'{"a": 1E5}',
    rb'{"a": 1e400}', rb'{"a": -1e400}', rb'{"a": 1e-400}', rb'{"a": 5e-324}', rb'{"a": 2.2250738585072011e-308}',
    rb'{"a": 18446744073709551616}', rb'{"a": -9223372036854775809}', rb'{"a": 123456789012345678901234567890}',
    b'{"a": ' + b"9" * 400 + b"}", b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"9" * 400 + b".5}",
    b'{"a": 0.' + b"1" * 800 + b"}", rb'{"a": NaN}', rb'{"a": -Infinity}', rb'{"a": 01}', rb'{"a": 1.}', rb'{"a": .5}',
    rb'{"a": +1}', rb'{"a": -}', rb'{"a": 1e}', rb'{"a": 0e0}', rb'{"a": tru}', rb'{"a": null}', rb'{"a": true}',
    rb'{"a": "\ud800"}', rb'{"a": "\udc00\ud800"}', rb'{"a": "\ud83d\ude00"}', rb'{"a": "\uD83D\u0041"}',
    rb'{"a": "\uD83Dx"}', rb'{"a": "\u12g4"}', rb'{"a": "\x"}', rb'{"a": "\/\b\f\n\r\t\"\\"}', rb'{"a": "\u0000"}',
    b'{"a": "\x00"}', b'{"a": "\x1f"}', b'{"a": "\x7f"}', b'{"a": "\t"}', b'{"a": "\xff"}', b'{"\xff": 1}',
    b'{"a": "\xed\xa0\x80"}', b'{"a": "\xc0\x80"}', b'{"a": "\xf5\x80\x80\x80"}', b'{"a": "\xe2\x80\xa8"}',
    b'\xef\xbb\xbf{"a": 1}', b'\x1e{"a": 1}', b'\x0b{"a": 1}', b'\xa0{"a": 1}', b' {"a": 1}\r\n', b'{"a": 1}\x00',
    b"", b"\n", b" \t\r\n", b"null", b"1", b'"x"', b"[1]", b"[1,]", rb'{"a": 1,}', rb'{"a": 1} x', rb'{"a": 1 2}',
    rb"{'a': 1}", rb"{1: 2}", rb'{"": 1}', b"[" * 90 + b"]" * 90, b"[" * 200_000 + b"]" * 200_000,
]  # fmt: skip


def strictly(line: bytes) -> Any:
    """Return what jsonlines over the standard library makes of a line, an error as its text."""
    try:
        return jsonlines.Reader([line], loads=reader.strict_loads).read(skip_empty=True)
    except EOFError:
        return reader.BLANK
    except jsonlines.InvalidLineError as error:
        return f"refused: {error}"


def quickly(line: bytes) -> Any:
    """Return what the reader makes of a line, an error as its text."""
    row = reader.parsed(line)
    return f"refused: {row}" if isinstance(row, jsonlines.InvalidLineError) else row


def same(a: Any, b: Any) -> bool:
    """Tell whether two JSON values are one: types, order of keys, and each bit of a float."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:30]))
def test_a_line_is_read_as_jsonlines_reads_it(line: bytes) -> None:
    assert same(quickly(line), strictly(line))


def test_damaged_lines_are_read_as_jsonlines_reads_them() -> None:
    draw = Random(0)
    whole = (
        '{"id": "a/0", "t": "ï — 🙂 \\u00e9\\n\\"", "n": [1, -2.5e-3, null, true], "j": {"k": 0.1, "k": 3}}'.encode()
    )
    taken = 0
    for _ in range(20_000):
        line = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(line))
            line[at : at + draw.randint(0, 2)] = draw.choice(
                [b"", b"\\", b'"', b"{", b"9", b"e", b"-", b".", b"\xc3", b"\x01", b"\\ud8", b"NaN", b",", b" ", b"]"]
            )
        read = quickly(bytes(line))
        assert same(read, strictly(bytes(line))), bytes(line)
        taken += not isinstance(read, str)
    assert 1_000 < taken < 19_000


def floats(draw: Random, count: int) -> list[float]:
    """Return floats of all sizes, and such as scores are."""
    any_bits = [struct.unpack("d", draw.randbytes(8))[0] for _ in range(count)]
    sizes = [math.exp(draw.uniform(-40, 40)) * draw.choice((1, -1)) for _ in range(count)]
    scores = [round(draw.uniform(-6, 6), draw.randint(0, 17)) for _ in range(count)]
    edges = [0.0, -0.0, 1e-3, 1e15, 1e16, -1e-3, 1e22, 5e-324, 1.7976931348623157e308, 11 / 3]
    return [number for number in any_bits + sizes + scores + edges if math.isfinite(number)]


def test_floats_are_read_and_written_as_json_does() -> None:
    for number in floats(Random(1), 20_000):
        text = repr(number)
        assert same(quickly(text.encode()), number)
        assert writer.encode_row([number]) == f"[{text}]\n".encode()


def test_every_character_is_written_as_json_does() -> None:
    for start in range(0, 0x110000, 64):
        text = "".join(map(chr, range(start, start + 64)))
        row = {"t": text, text: [text]}
        surrogates = 0xD800 <= start < 0xE000
        expected = json.dumps(row, ensure_ascii=surrogates) + "\n"
        assert writer.encode_row(row) == expected.encode()
        assert same(quickly(expected.encode()), row)


@pytest.mark.parametrize(
    "value",
    [
        {}, [], [[], {}], {"a": {}, "b": []}, {"a, b": "c: d, {e}"}, True, None, 2**63, 2**64, -(2**63), 10**40,
        {"n": {1: 2, None: 3, False: 4, 1.5: 6}}, (1, (2,)), {"t": "\ud83d"}, {"t": "\ud83d", "n": 10**40},
        [1e-7, 1e300],
    ],
    ids=repr,
)  # fmt: skip
def test_values_are_written_as_json_does(value: Any) -> None:
    ascii_only = "\\ud8" in json.dumps(value)
    assert writer.encode_row({"v": value}) == (json.dumps({"v": value}, ensure_ascii=ascii_only) + "\n").encode()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "wrap", [lambda n: n, lambda n: [1, [n]], lambda n: {"a": {"b": n}}], ids=["bare", "list", "dict"]
)
def test_what_is_no_json_number_is_never_written(number: float, wrap) -> None:
    with pytest.raises(ValueError):
        writer.encode_row({"v": wrap(number)})
