"""Text and documents that programs stumble over, made here: no list of anybody else's is copied."""

# The tables are read by their kinds, one a line.
# ruff: noqa: E501

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from typing import Final


def strings() -> list[str]:
    """Some hundreds of strings that a service may take for something else than text."""
    found = [
        *("undefined", "null", "NULL", "None", "nil", "true", "False", "NaN", "-Infinity", "0", "-0", "1e1000"),
        *("1/0", "0x0", "١٢٣", "1,000.00", "2147483648", "9223372036854775808", "0.1e-9999", "½", "Ⅷ"),
        *("'", '"', "''", "`", "\\", "\\'", "';--", "1' OR '1'='1", "'); DROP TABLE tasks;--", "$1", "$$", ":title"),
        *("%s", "%d%n", "%(title)s", "{title}", "{0.__class__}", "${HOME}", "$(id)", "`id`", "| id", "&& id"),
        *("<script>x()</script>", "<img src=x onerror=x()>", "&lt;b&gt;", "]]>", "<!--", "javascript:x()"),
        *("../../../etc/passwd", "..\\..\\x", "file:///etc/passwd", "C:\\CON", "//example.com", "/dev/null"),
        *("a\tb", "a\nb", "a\r\nb", "\r\nSet-Cookie: a=b", "\x1b[31mred\x1b[0m", "a\x08b", "\x7f", "\x07", "\x85x"),
        *("_", "%", "a%b_c", "\\%", "100 %", "{}", "[]", '{"title": 1}', "=1+1", "@SUM(A1)", "+1", "-1"),
        *("ß", "ẞ", "İstanbul", "ıi", "ﬁ", "ǅ", "Å", "Å", "é", "é", "Ω", "Ω", "日本語", "표준", "العربية", "עברית"),
        *("a\u202eb\u202c", "\u200b", "\u2060x", "\ufeffx", "x\u00ad", "\u034f", "\u3164", "\u2800", "\ufffd", "\uffff"),
        *("👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "\U0010ffff", "\U000e0001", "1️⃣", "𝕿𝖊𝖝𝖙", "𒐫" * 10, "￼"),
        " leading", "trailing ", "a" * 255, "💥" * 255, "e" + "\u0301" * 200, "\u0301",
    ]  # fmt: skip
    # One of every category of character, and every control character but NUL, which is a row of its own.
    by_category: dict[str, str] = {}
    for number in (*range(1, 0xD800), *range(0xE000, 0x11000)):
        by_category.setdefault(unicodedata.category(chr(number)), chr(number))
    found += [f"x{character}y" for character in by_category.values()]
    found += [f"x{chr(number)}y" for number in (*range(1, 32), *range(127, 160), 0x2028, 0x2029)]
    return list(dict.fromkeys(found))


BROKEN: Final = [
    *(b"", b" ", b"{", b"}", b"[", b"]", b'"', b'"a', b'{"title"', b'{"title":', b'{"title":"a"', b'{"title":"a",'),
    *(b'{"title":"a",}', b'{"title":"a"}}', b'{"title":"a"}]', b'{"title":"a"} x', b'{"title":"a"}{}', b'{"title":"a"},'),
    *(b"{'title':'a'}", b'{title:"a"}', b'{"title" "a"}', b'{"title"::"a"}', b'{"title",:"a"}', b'{:"a"}', b'{"title":"a";}'),
    *(b'{,"title":"a"}', b'{"title":"a",,"description":"b"}', b'{1:"a"}', b'{null:"a"}', b'{["title"]:"a"}'),
    *(b"nul", b"tru", b"falsee", b"TRUE", b"None", b"undefined", b"abc", b"//", b"/*a*/{}", b'{"title":"a"}//', b"#"),
    *(b"\xef\xbb\xbf{}", '{"title":"a"}'.encode("utf-16"), '{"title":"a"}'.encode("utf-32"), b"\x00", b"\x00{}"),
    *(b'{"title":"a\nb"}', b'{"title":"a\tb"}', b'{"title":"a\x00b"}', b'{"title":"\\x41"}', b'{"title":"\\u12"}'),
    *(b'{"title":"\\u123g"}', b'{"title":"\\"}', b'{"title":"\\\'"}', b'{"title":"\\U0041"}', b'{"title":"\\ a"}'),
    *(b'{"title":"\xff"}', b'{"title":"\xc0\xaf"}', b'{"title":"\xed\xa0\x80"}', b'{"title":"\xf8\x88\x80\x80\x80"}'),
    *(b'{"title":"\xe2\x82"}', b'{"title":"\x80"}', b'{"title":"\xf4\x90\x80\x80"}', b'\xc3\x28', b'{"\xff":1}'),
]  # fmt: skip
"""No JSON at all: as a body each is refused."""

WRONG_VALUES: Final = [
    *(b"+1", b"01", b"-01", b"1.", b".5", b"-.5", b"1e", b"1e+", b"1.e1", b"0x1", b"1_000", b"1,5", b"--1", b"- 1", b"1a"),
    *(b"Inf", b"Infinity", b"-Infinity", b"NaN", b"nan", b"+Infinity", b"0b1", b"0o7", b"1 000", b"\xef\xbc\x91", b"1e9999"),
    *(b"[1", b"[1,]", b"[,1]", b"[1,,2]", b"[1 2]", b"[1:2]", b"['a']", b"[a", b"[}", b"{]", b"{\"a\":1,}", b"{\"a\"}"),
    *(b"'a'", b"`a`", b"a", b'"a""b"', b'"a" "b"', b'"a', b'a"', b'\\"a"', b"\\u0041", b'"\\a"', b'"\\u00A"', b"<a>", b"(1)"),
]  # fmt: skip
"""What is no JSON where a value has to stand."""


def valid_documents() -> list[bytes]:
    """Documents that are JSON, most of them no task: whatever they are, they are no fault of the service's."""
    values = [
        *("null", "true", "false", "0", "-0", "1", "-1", "1.5", "1e5", "1E-5", "123456789012345678", "1e-400"),
        *('""', '"a"', '"\\u0061\\n\\"\\\\\\/"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\U0001f600"'),
        *("[]", "{}", "[[]]", '{"a":{}}', "[1,2,[3,{}]]", '{"":0}', '{"a":[null,true]}', "[" * 30 + "]" * 30),
        *('{"title":1}', '{"title":null}', '{"title":{}}', '{"title":[]}', '{"title":true}', '"' + "a" * 3000 + '"'),
    ]  # fmt: skip
    found = [value.encode() for value in values]
    found += [f" \t\r\n{value}\n".encode() for value in values]
    found += [f'{{"title":"a","description":{value}}}'.encode() for value in values]
    found += [f'{{"title":{value}}}'.encode() for value in values]
    return found


def broken_documents(seed: int = 20260, count: int = 150) -> list[bytes]:
    """BROKEN, WRONG_VALUES in their places, and documents that lost or gained a piece and are no JSON any more."""
    found = [*BROKEN, *WRONG_VALUES]
    found += [b'{"title":"a","description":' + value + b"}" for value in WRONG_VALUES]
    found += [b'{"title":' + value + b"}" for value in WRONG_VALUES]
    chance = random.Random(seed)
    whole = b'{"title": "a \\u00e9", "description": "b", "is_completed": false}'
    while len(found) < len(BROKEN) + 3 * len(WRONG_VALUES) + count:
        place = chance.randrange(len(whole))
        piece = bytes([chance.choice(b'{}[]",:\\ux01e-+.ntf \x00\xff')])
        changed = chance.choice(
            [whole[:place] + whole[place + 1 :], whole[:place] + piece + whole[place:], whole[:place]]
        )
        if not is_json(changed):
            found.append(changed)
    return list(dict.fromkeys(found))


def is_json(document: bytes) -> bool:
    """By Python's own reader, told to take no constant that RFC 8259 does not have."""

    def refuse(constant: str) -> Iterator[None]:
        raise ValueError(constant)

    try:
        json.loads(document.decode("utf-8"), parse_constant=refuse)
    except ValueError:
        return False
    return True
