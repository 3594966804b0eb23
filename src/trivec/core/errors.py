"""All errors. A message holds the value, the limit and the next step; never an internal.

TrivecError
├── StartError         the process cannot start: one line on stderr, exit code 2
│   └── SettingInvalid · CheckpointRefused · StoreRefused
├── DeviceLost         a backend's device is gone for good
├── JobFailed          bulk work is refused, or stops: one line on stderr, exit code 2
└── ServiceError       a request is answered with it; `api/errors.py` holds the table
    ├── RequestError   the client must change the request
    │   └── MalformedBody · FieldInvalid (TokenIdUnknown) · TokenIdsForeign · TextTooLong ·
    │       RequestTooLarge · AnswerTooLarge · ModelUnknown · BodyTooLarge · BodyTooSlow ·
    │       MediaTypeUnsupported · RouteUnknown · MethodNotAllowed · ResourceUnknown
    ├── AccessError    the key must change
    │   └── KeyMissing · KeyInvalid · ModelDenied · ScopeMissing · GrantDenied
    ├── BusyError      we must recover; each says when to try again
    │   └── Overloaded · Draining · Loading · DeadlineExceeded · StoreUnavailable
    ├── RateLimitExceeded  the client must wait
    └── EngineFault    our mistake; the message is only for the log
"""

from collections.abc import Iterator
from contextlib import contextmanager

OPENAI_IDS = (
    "In LangChain's OpenAIEmbeddings set check_embedding_ctx_length=False. If they are OpenAI's, "
    'send "token_encoding": "cl100k_base" (or "o200k_base") and they are made into texts again.'
)


class TrivecError(Exception):
    """Every error we raise on purpose."""


class StartError(TrivecError):
    """The process cannot start, and why, in one line that ends in a next step."""


class SettingInvalid(StartError):
    """A setting is unknown or has a value it cannot have."""


class CheckpointRefused(StartError):
    """A model's files are missing, damaged, unsafe or not understood."""


class StoreRefused(StartError):
    """The store is absent, away, of another schema, or its keys were made with another secret."""


class DeviceLost(TrivecError):
    """`Backend.run` cannot work again in this process; its message says what the driver said.

    The engine fails what waits with a `ServiceError`, and says that the process is not ready.
    """


class JobFailed(TrivecError):
    """Bulk work cannot begin or go on, and why, in one line that ends in a next step."""


class ServiceError(TrivecError):
    """A request is answered with this."""


class RequestError(ServiceError):
    """The client must change the request. `param` names the field at fault, as `input[17]`."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MalformedBody(RequestError):
    """The body is not a JSON object in UTF-8."""


class FieldInvalid(RequestError):
    """A field is missing, unknown, of the wrong type or out of range."""


class TokenIdUnknown(FieldInvalid):
    """A token id is outside the model's vocabulary."""

    def __init__(self, *, token_id: int, vocabulary_size: int, param: str) -> None:
        super().__init__(
            f"Token id {token_id} is outside this model's vocabulary of {vocabulary_size} ids. "
            f"Send the text itself, or ids of this model's own tokenizer. {OPENAI_IDS}",
            param=param,
        )


class TokenIdsForeign(RequestError):
    """Arrays of token ids were made by another model's tokenizer."""

    def __init__(self) -> None:
        super().__init__(
            "The token ids in 'input' do not look like this model's own: ids of another tokenizer, "
            f"as OpenAI's tiktoken, name other words here. Send texts instead. {OPENAI_IDS} If "
            'they are this model\'s, send "token_encoding": "model" and they are taken as they are.',
            param="input",
        )


class TextTooLong(RequestError):
    """A text has more tokens than the model reads."""

    def __init__(
        self,
        *,
        token_count: int | None,
        token_count_max: int,
        index: int | None,
        bytes_max: int | None = None,
    ) -> None:
        """*token_count* None: it was not counted, for having more than *bytes_max*. *index* None: a
        query that leaves no room for its document.
        """
        self.index = index
        param = "query" if index is None else f"input[{index}]"
        found = f"{token_count} tokens"
        if bytes_max is not None:
            found = f"a text of more than {bytes_max:,} bytes, {bytes_max // token_count_max} for "
            found += "each token, which is not read"
        super().__init__(
            f"This model's maximum context length is {token_count_max} tokens, however you "
            f"requested {found} ({param}). Please shorten that input"
            + ("." if index is None else ', or send "truncate": "end" to have it cut.'),
            param=param,
        )


class RequestTooLarge(RequestError):
    """All inputs together have more tokens than one request may."""

    def __init__(
        self,
        *,
        token_count: int,
        token_count_max: int,
        is_counted_out: bool = True,
        kind: str = "",
    ) -> None:
        """*is_counted_out* False: counting ended at *token_count*, with some inputs left. *kind*: what
        requests have this maximum, if not all.
        """
        more = "" if is_counted_out else " or more"
        super().__init__(
            f"Requested {token_count}{more} tokens, max {token_count_max} tokens per request{kind}. "
            "Please split the input over several requests."
        )


class AnswerTooLarge(RequestError):
    """The answer would be larger than the server sends."""

    def __init__(self, *, answer_bytes: int, answer_bytes_max: int) -> None:
        super().__init__(
            f"The answer would take about {answer_bytes:,} bytes; at most {answer_bytes_max:,} "
            "are sent. Ask for fewer inputs or outputs at a time, or for base64."
        )


class ModelUnknown(RequestError):
    """No served model has this id."""

    def __init__(self, *, model: str, served: tuple[str, ...]) -> None:
        super().__init__(
            f"The model `{model}` does not exist or you do not have access to it. "
            f"Served here: {', '.join(served) or 'nothing that this key may use'}.",
            param="model",
        )


class BodyTooLarge(RequestError):
    """The body has more bytes, or arrives in more pieces, than are read."""


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""


class MediaTypeUnsupported(RequestError):
    """The body is not declared as JSON, or is compressed."""


class RouteUnknown(RequestError):
    """Nothing is served at this path."""


class MethodNotAllowed(RequestError):
    """The path is known, the method is not."""

    def __init__(self, *, method: str, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed
        super().__init__(f"{method} is not allowed here; use {' or '.join(allowed)}.")


class ResourceUnknown(RequestError):
    """An administered thing, such as a key, does not exist."""


class AccessError(ServiceError):
    """The key must change."""


class KeyMissing(AccessError):
    """No bearer key was sent."""

    def __init__(self) -> None:
        super().__init__(
            "You didn't provide an API key. Send it in an Authorization header using Bearer auth "
            "(i.e. Authorization: Bearer YOUR_KEY)."
        )


class KeyInvalid(AccessError):
    """The key is wrong, revoked or expired: the same words whichever, so as to tell nobody."""

    def __init__(self) -> None:
        super().__init__("Incorrect API key provided. Ask whoever runs this server for a key.")


class ModelDenied(AccessError):
    """The key may not use this model."""

    def __init__(self, *, model: str) -> None:
        super().__init__(f"This API key may not use the model `{model}`.")


class ScopeMissing(AccessError):
    """The key lacks the scope that the route asks for."""

    def __init__(self, *, scope: str) -> None:
        super().__init__(f"This API key lacks the scope `{scope}`, which this request needs.")


class GrantDenied(AccessError):
    """An admin key with limits of its own was asked for, or about, a key that may do more."""

    def __init__(self, *, param: str, most: str) -> None:
        super().__init__(
            f"This admin key is limited itself: the {param} of a key that it makes or changes may "
            f"be at most {most}. Ask for less, or use an admin key without limits."
        )
        self.param = param


class RateLimitExceeded(ServiceError):
    """The client must wait: the key's own rate limit is used up for now."""

    def __init__(
        self, *, kind: str, limit: int, requested: int, retry_after_s: float, subject: str = ""
    ) -> None:
        """*subject* is what is limited, where that is not *kind* per minute."""
        self.kind = kind  # "requests" or "tokens"
        self.retry_after_s = retry_after_s
        super().__init__(
            f"Rate limit reached for {subject or f'{kind} per minute'}: limit {limit}, requested "
            f"{requested}. Please try again in {retry_after_s:.3f}s."
        )


class BusyError(ServiceError):
    """We must recover. `retry_after_s` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(BusyError):
    """The queue is full."""


class Draining(BusyError):
    """The process is about to stop."""


class Loading(BusyError):
    """The model is not loaded yet."""


class DeadlineExceeded(BusyError):
    """The request waited too long for its first batch."""


class StoreUnavailable(BusyError):
    """The ledger cannot be written, so nothing may be served."""


class EngineFault(ServiceError):
    """Our mistake. The client reads a fixed sentence with the request id; this one is logged."""


def is_panic(error: BaseException) -> bool:
    """A Rust library's panic: no `Exception`, and yet no request to stop."""
    from asyncio import CancelledError  # slow to import, as asking for help need not

    ours = (Exception, CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit)
    return not isinstance(error, ours)


@contextmanager
def panics_are_faults(library: str) -> Iterator[None]:
    """Raise `EngineFault` where *library* panics; what a panic says may hold a client's text."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise EngineFault(f"the {library} panicked: {type(error).__name__}") from None
