"""Bad and odd requests by rule, thousands of them: what a parser of JSON, numbers and text can meet.

Each case is a name and a whole body. None may be answered with 5xx, whatever else it is. All cases
are made here, from rules; nothing is copied from anyone's collection.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product

MODEL = "baai/bge-m3"

NUMBERS = [
    *(str(sign * 2**power + step) for power in (7, 8, 15, 16, 31, 32, 53, 63, 64, 80)
      for sign in (1, -1) for step in (-1, 0, 1)),
    *("0", "-0", "1", "-1", "999", "1000", "1001", "250001", "250002"),
    *("0.0", "-0.0", "1.0", "0.5", "1e0", "1E5", "1e-5", "1e308", "1e309", "-1e309", "1e999", "5e-324"),
    *("1" + "0" * zeros for zeros in (18, 19, 20, 100, 308, 309, 400, 4300, 20_000)),
    *("0." + "0" * zeros + "1" for zeros in (20, 400, 4300)),
    *("NaN", "Infinity", "-Infinity", "nan", "+1", "01", "-01", "1.", ".1", "1e", "1e+", "0x10", "1_000"),
    *("--1", "- 1", "1 2", "1,,2", "٣", "１", "½"),
]  # fmt: skip

SCALARS = [
    "null",
    "true",
    "false",
    '""',
    '" "',
    '"a"',
    "[]",
    "{}",
    "[null]",
    '[""]',
    "[[]]",
    "[{}]",
    '{"a":1}',
]

BROKEN = [
    *("", " ", "\n", "\t", "\x00", "{", "}", "[", "]", "{}", "[]", "null", "true", "0", '"', '""', ":", ","),
    *('{"', '{"a', '{"a"', '{"a":', '{"a":1', '{"a":1,', '{"a":1,}', '{,}', '{:}', '{"a":}', '{"a" 1}', "{a:1}"),
    *("{'a':1}", '{"a":1}}', '{"a":1}{"a":1}', '{"a":1} x', "[1,2", "[1 2]", "[1,,2]", "[,]", "//x", "/**/{}"),
    *('{"a":1}#', '{"a":"\\', '{"a":"\\x41"}', '{"a":"\\u"}', '{"a":"\\u00"}', '{"a":"\\uZZZZ"}', "NaN", "undefined"),
    *("tru", "nul", "TRUE", "None", "-", "+", ".", "e", "<html>", "a=b&c=d", "--\r\n", "{}\x00", "\ufeff{}"),
]  # fmt: skip

CONTROLS = [chr(code) for code in range(0x20)]

# One of each kind of thing that Unicode can hold.
TEXTS = [
    *("\u0000", "\u0001", "\u007f", "\u0080", "\u00ad", "\u200b", "\u200d", "\u202e", "\u2028", "\u2029"),
    *("\ufdd0", "\ufeff", "\ufffd", "\uffff", "\U0001f600", "\U0010ffff", "\U000e0041", "\ue000"),
    *("e\u0301" * 20, "a" + "\u0300" * 60, "\ufdfa" * 20, "👩‍👩‍👧‍👦", "🇩🇪🇩🇪", "ﬃ", "İ", "ß", "Ǆ"),
    *("مرحبا", "שלום", "नमस्ते", "สวัสดี", "你好", "こんにちは", "안녕", "გამარჯობა", "ሰላም", "𝔘𝔫𝔦", "ᚠᚢᚦ"),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2003 ", "a ", " a", "a\u0000b"),
    *("<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[MASK]", "##a", "▁", "<|endoftext|>"),
    *("' OR 1=1 --", "'; DROP TABLE ledger; --", "../../etc/passwd", "${jndi:ldap://x}", "{{7*7}}", "%s%n%x"),
    *("<script>alert(1)</script>", "\x1b[31mred", "A" * 60, "http://[::1]/", "null", "true", "0", "NaN"),
]  # fmt: skip

FIELDS = (
    *("model", "input", "encoding_format", "dimensions", "user", "output_type", "truncate"),
    *("return_tokens", "token_encoding", "trunkate", "stream", "input_type", "prompt_name", "prompt"),
    *("output_dimension", "output_dtype", "truncation", "truncate_prompt_tokens", "late_chunking"),
    "chunk_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One request, and what it is."""

    name: str
    body: bytes


def all_cases() -> Iterator[Case]:
    """Every case, about 7,000, always in the same order."""
    return chain(
        _named("broken json", (text.encode() for text in BROKEN)),
        _named("number", _in_places(NUMBERS)),
        _named("scalar", _in_places(SCALARS)),
        _named("field of the wrong kind", _fields()),
        _named("text", _texts()),
        _named("surrogate", _surrogates()),
        _named("bytes that are not utf-8", _broken_bytes()),
        _named("nesting", _nesting()),
        _named("cut short", _cut_short()),
        _named("one byte changed", _one_byte_changed()),
        _named("limit", _limits()),
    )


def _named(name: str, bodies: Iterator[bytes]) -> Iterator[Case]:
    return (Case(f"{name} {i}", body) for i, body in enumerate(bodies))


def _body(**fields: str) -> bytes:
    """A body from raw JSON values; the usual model and input where they are not given."""
    given = {"model": json.dumps(MODEL), "input": '"a"'} | fields
    return (
        "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in given.items()) + "}"
    ).encode()


def _in_places(values: list[str]) -> Iterator[bytes]:
    """Each value everywhere that a value can be."""
    for value in values:
        yield from (_body(**{field: value}) for field in FIELDS)
        for shape in ("[%s]", "[5,%s]", '["a",%s]', "[[%s]]", "[[5],[6,%s]]", "[[[%s]]]"):
            yield _body(input=shape % value)
        yield _body(output_type=f"[{value}]")
        yield value.encode()
        yield f"[{value}]".encode()


def _fields() -> Iterator[bytes]:
    for field, value in product(FIELDS, ['"x"', "1", "[1]", '{"$ne":null}', '["a","b"]', "1.5"]):
        yield _body(**{field: value})
        yield b'{"%b":%b}' % (field.encode(), value.encode())
    for name in (
        "",
        " ",
        "Model",
        "INPUT",
        "input ",
        "\u0000",
        "__proto__",
        "constructor",
        "é",
        "a" * 10_000,
    ):
        yield _body(**{name: "1"})
    for first, second in product(('"a"', "null", "7", "[]"), repeat=2):
        yield b'{"model":"%b","input":%b,"input":%b}' % (
            MODEL.encode(),
            first.encode(),
            second.encode(),
        )


def _texts() -> Iterator[bytes]:
    for text in TEXTS:
        for quoted in (json.dumps(text), json.dumps(text, ensure_ascii=False)):
            yield from (
                _body(**{field: quoted}) for field in ("input", "model", "user", "output_type")
            )
            yield _body(input=f"[{quoted},{quoted}]")
            yield _body(encoding_format=quoted)
    for control in CONTROLS:
        yield _body(input=f'"a{control}b"')  # raw: JSON forbids it
        yield _body(input=json.dumps(f"a{control}b"))
        yield _body(input=f'"a"{control}')


def _surrogates() -> Iterator[bytes]:
    """Every lone one in steps, then pairs in the wrong order, cut off, and inside other fields."""
    for code in range(0xD800, 0xE000, 2):
        yield _body(input=f'"\\u{code:04x}"')
    for high, low in product(
        ("\\ud800", "\\udbff"), ("\\udc00", "\\udfff", "a", "\\n", "\\ud800", "")
    ):
        yield _body(input=f'"{high}{low}"')
        yield _body(input=f'"{low}{high}"')
        yield _body(user=f'"{high}{low}"')
        yield _body(model=f'"{high}{low}"')
        yield _body(x=f'"{high}{low}"')
        yield _body(input=f'["a","{high}{low}"]')


def _broken_bytes() -> Iterator[bytes]:
    """Starts without ends, ends without starts, overlong forms, surrogates, beyond the last code."""
    wrong = [bytes([first]) for first in range(0x80, 0x100)]
    wrong += [b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xed\xa0\x80", b"\xed\xbf\xbf"]
    wrong += [b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xc3(", b"\xe2\x82", b"\xf0\x9f\x98"]
    for some in wrong:
        yield b'{"model":"%b","input":"%b"}' % (MODEL.encode(), some)
        yield b'{"model":"%b","input":"a"}' % some
        yield b'{"%b":1}' % some
    yield from (some + _body() for some in wrong[:16])
    yield from (
        _body().decode().encode(form) for form in ("utf-16", "utf-32", "utf-16-be", "utf-8-sig")
    )


def _nesting() -> Iterator[bytes]:
    for power in range(19):
        deep = 2**power
        yield _body(input="[" * deep + "]" * deep)
        yield _body(input="[" * deep + '"a"' + "]" * deep)
        yield _body(input="[" * deep)
        yield _body(user='{"a":' * deep + "1" + "}" * deep)
        yield ("[" * deep + "]" * deep).encode()
        yield ('{"input":' * deep + "1" + "}" * deep).encode()


def _cut_short() -> Iterator[bytes]:
    whole = _body(
        input='["a","\\u00e9\\ud83d\\ude00","ü"]',
        truncate='"end"',
        output_type='["dense","sparse"]',
    )
    yield from (whole[:length] for length in range(len(whole)))
    yield from (whole[start:] for start in range(1, len(whole)))


def _one_byte_changed() -> Iterator[bytes]:
    whole = _body(input='["a",  "b"]', dimensions="8", return_tokens="true")
    for place in range(len(whole)):
        for byte in b'\x00"\\{}[],:0-e\xff ':
            yield whole[:place] + bytes([byte]) + whole[place + 1 :]
        yield whole[:place] + whole[place + 1 :]
        yield whole[:place] + whole[place : place + 1] + whole[place:]


def _limits() -> Iterator[bytes]:
    for count in (1, 2, 2047, 2048, 2049, 5000):
        yield _body(input=json.dumps(["a"] * count))
        yield _body(input=json.dumps([[5]] * count))
        yield _body(input=json.dumps([5] * count))
        yield _body(input=json.dumps([""] * count))
    for length in (61, 62, 63, 64, 1000, 4095, 4096, 4097, 100_000):
        yield _body(input=json.dumps("a" * length))
        yield _body(input=json.dumps("é" * length), truncate="true")
        yield _body(input=json.dumps("😀" * length), truncate='"start"')
        yield _body(user=json.dumps("u" * length))
        yield _body(model=json.dumps("m" * length))
