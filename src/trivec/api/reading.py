"""Bytes into a typed request, or the exact refusal: JSON, types and ranges; no meaning yet.

msgspec says what is wrong and where; here its words become OpenAI's and its paths become `param`.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from trivec.core.errors import FieldInvalid, MalformedBody

Request = TypeVar("Request")

SHOWN_CHARS_MAX = 80  # how much of a client's own value a message repeats

_WHERE = re.compile(r" - at `\$(?:\.(?P<path>.*))?`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_NOT_LISTED = re.compile(r"Invalid enum value '(?P<value>.*)'", re.DOTALL)
_WRONG_TYPE = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<found>[^`]*)`")


def reader(kind: type[Request]) -> Callable[[bytes], Request]:
    """A function that makes a *kind* of a body, or raises `MalformedBody` or `FieldInvalid`."""
    decoder = msgspec.json.Decoder(kind)
    supported = _supported_values(kind)
    fields = frozenset(get_type_hints(kind))

    def read(body: bytes) -> Request:
        body = body.removeprefix(codecs.BOM_UTF8)
        try:
            try:
                return decoder.decode(body)
            except msgspec.ValidationError:
                return decoder.decode(_mended(body, fields, supported))
        except msgspec.ValidationError as refused:
            raise _field_refused(str(refused), supported) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as refused:
            if param := _text_at_fault(body):
                raise FieldInvalid(
                    f"Invalid '{param}': it holds half of a surrogate pair, or bytes that are not "
                    "UTF-8, which are no characters. Remove or replace them.",
                    param=param,
                ) from None
            raise MalformedBody(
                "We could not parse the JSON body of your request "
                f"({_where_it_broke(refused, body)}). Send one JSON object in UTF-8."
            ) from None

    return read


def _mended(body: bytes, fields: frozenset[str], supported: Mapping[str, Sequence[str]]) -> bytes:
    """*body* without unknown fields that are null, its words in lower case where that is one.

    Only for what was refused as it is: the ordinary request is parsed once.
    """
    given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    kept: dict[str, object] = {}
    for name, value in given.items():
        if name in supported:
            kept[name] = _lowered(msgspec.json.decode(value), supported[name])
        elif name in fields or bytes(value) != b"null":
            kept[name] = value
    return msgspec.json.encode(kept)


def _lowered(value: object, words: Sequence[str]) -> object:
    if isinstance(value, list):
        return [_lowered(one, words) for one in value]
    return value.lower() if isinstance(value, str) and value.lower() in words else value


def _text_at_fault(body: bytes) -> str | None:
    """The field, as `input[3]`, whose text cannot be Unicode; None where none is to be found."""
    try:
        parsed = json.loads(body.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict):
        return None
    for name, value in parsed.items():
        if isinstance(value, str) and _has_surrogate(value):
            return shown(name)
        if isinstance(value, list):
            for i, one in enumerate(value):
                if isinstance(one, str) and _has_surrogate(one):
                    return f"{shown(name)}[{i}]"
    return None


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def shown(value: str) -> str:
    """A client's own value, short enough and clean enough for a message."""
    clean = value.encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= SHOWN_CHARS_MAX else clean[:SHOWN_CHARS_MAX] + "…"


def _field_refused(
    complaint: str, supported: Mapping[str, Sequence[str]]
) -> MalformedBody | FieldInvalid:
    where = _WHERE.search(complaint)
    param = where["path"] if where is not None else None
    words = complaint[: where.start()] if where is not None else complaint
    if missing := _MISSING.fullmatch(words):
        return _missing(missing["name"])
    if unknown := _UNKNOWN.fullmatch(words):
        name = shown(unknown["name"])
        return FieldInvalid(
            f"Unrecognized request argument supplied: {name}. Remove it, or correct its name.",
            param=name,
        )
    if param is None:
        return MalformedBody(f"The body must be one JSON object. {words}.")
    if not_listed := _NOT_LISTED.fullmatch(words):
        return FieldInvalid(
            f"Invalid value for '{param}' = {shown(not_listed['value'])}. "
            f"Supported values: {list(supported[param.partition('[')[0]])}.",
            param=param,
        )
    wrong = _WRONG_TYPE.fullmatch(words)
    if wrong is None:  # a range: Expected `int` >= 1, Integer value out of range
        return FieldInvalid(f"Invalid value for '{param}'. {words}.", param=param)
    if wrong["found"] == "null" and param in ("model", "input"):
        return _missing(param)
    expected = wrong["expected"].replace(" | ", " or ")
    return FieldInvalid(
        f"Invalid type for '{param}': expected {expected}, but got {wrong['found']} instead.",
        param=param,
    )


def _supported_values(kind: type[Request]) -> Mapping[str, Sequence[str]]:
    """The words that each field of *kind* can hold, of those that can hold only certain words."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: words for name, hint in hints.items() if (words := _words(hint))}


def _words(hint: object) -> tuple[str, ...]:
    if get_origin(hint) is Literal:
        return tuple(str(word) for word in get_args(hint))
    return tuple(word for inner in get_args(hint) for word in _words(inner))


def _missing(name: str) -> FieldInvalid:
    article = "an" if name[0] in "aeiou" else "a"
    return FieldInvalid(f"you must provide {article} {name} parameter", param=name)


def _where_it_broke(refused: Exception, body: bytes) -> str:
    if isinstance(refused, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(refused, RecursionError):
        return "it is nested too deep"
    if not body:
        return "it is empty"
    return str(refused).removeprefix("JSON is malformed: ")
