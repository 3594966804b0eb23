"""What a handler gives back: a status, headers, and a body in pieces that need no joining."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

Headers = tuple[tuple[bytes, bytes], ...]
JSON = b"application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer. Its body is the pieces of `body` end to end."""

    status: int
    body: Sequence[bytes]
    media_type: bytes = JSON
    headers: Headers = ()

    @property
    def byte_count(self) -> int:
        return sum(map(len, self.body))


def json_answer(value: object, *, status: int = 200, headers: Headers = ()) -> Answer:
    """*value* (a msgspec structure, a dataclass or plain data) as a JSON answer."""
    return Answer(status, (msgspec.json.encode(value),), headers=headers)
