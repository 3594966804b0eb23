"""One frozen tree of settings, built once at the entrance; each package receives only its section.

Flags win over the environment (`TRIVEC_*`), the environment over the file, the file over the
defaults here. It knows names, defaults and help; not what they do. Nothing else reads the
environment.
"""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from trivec.core.errors import SettingInvalid

MEBIBYTE = 1024 * 1024
API_KEY_CHARS_MIN = 16
API_KEY_CHARS_MAX = 1024  # longer bearers are refused unread
ENVIRONMENT_PREFIX = "TRIVEC_"
OTHER_NAMES = {"TRIVEC_MODEL": "models", "TRIVEC_CONFIG": "config"}
CLIENT_KEYS = ("TRIVEC_EMBED_KEY", "TRIVEC_BENCH_KEY")  # of commands that ask a server
OTHER_FLAGS = {  # that are not called as their setting
    "models": "--model",
    "aliases": "--alias",
    "http.cors_origins": "--cors-origin",
    "faces": "--face",
    "batch.tokens_per_day": "--batch-tpd",
}
SECRETS = ("api_key", "database_url", "secret")  # no message shows their values
PRECISIONS = ("auto", "fp32", "int8", "bf16", "fp16")


def _split_at_commas(value: object) -> object:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


def _as_bool(value: object) -> object:
    """*value* as a truth where pydantic has one for it, else as it is."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return value


NoAuth: TypeAlias = Annotated[Literal[False, True, "anywhere"], BeforeValidator(_as_bool)]


def _check_precision(name: str) -> str:
    """What a recipe may be called is its backend's to say; that it is one begins with int8-."""
    if name not in PRECISIONS and not name.startswith("int8-"):
        raise ValueError(f"must be {', '.join(PRECISIONS)} or a recipe such as int8-rows")
    return name


def _check_alias(pair: str) -> str:
    name, _, model = pair.partition("=")
    if not name or not model:
        raise ValueError("must be NAME=ID, as text-embedding-3-small=baai/bge-m3")
    return pair


def _check_origin(origin: str) -> str:
    """A browser sends scheme, host and port, and the two are compared as texts."""
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
        raise ValueError("must be * or SCHEME://HOST[:PORT], as https://chat.example.org")
    return origin


Aliases: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_check_alias)], ...], BeforeValidator(_split_at_commas)
]
Origins: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_check_origin)], ...], BeforeValidator(_split_at_commas)
]
Models: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]
FaceName: TypeAlias = Literal["openai", "batches", "cohere", "tei", "vllm", "ollama"]
Faces: TypeAlias = Annotated[tuple[FaceName, ...], BeforeValidator(_split_at_commas)]
Folder: TypeAlias = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class HttpLimits(Section):
    """Bounds of one request and of one connection, and whether there are pages to look at."""

    body_bytes_max: int = Field(8 * MEBIBYTE, ge=1024)
    """Largest request body."""
    cors_origins: Origins = ()
    """Web page, as https://chat.example.org, whose scripts may send requests from a browser; * is any. May be repeated."""
    body_s_max: float = Field(30.0, gt=0)
    """Seconds in which a request body must have arrived."""
    body_chunks_max: int = Field(4096, ge=1)
    """Most pieces a request body may arrive in."""
    memory_bytes_max: int | None = Field(None, ge=64 * MEBIBYTE)
    """Most bytes that bodies, vectors and answers hold at one time; unset: a fourth of the memory, at most 512 MiB."""
    refused_body_bytes_max: int = Field(32 * MEBIBYTE, ge=0)
    """Most bytes that are read and dropped of a body after its request was refused."""
    refused_body_s_max: float = Field(10.0, gt=0)
    """Seconds in which that must be over; then the connection is cut."""
    inputs_max: int = Field(2048, ge=1)
    """Most texts in one request."""
    request_tokens_max: int = Field(300_000, ge=1)
    """Most tokens in one request, all inputs together."""
    answer_bytes_max: int = Field(256 * MEBIBYTE, ge=1024)
    """Largest answer, estimated before anything is computed."""
    answer_chunk_bytes: int = Field(256 * 1024, ge=1024)
    """Answers larger than this are sent in pieces of this size."""
    answer_chunk_s_max: float = Field(30.0, gt=0)
    """Seconds in which a client must take one piece of an answer."""
    answer_bytes_per_s_min: int = Field(64 * 1024, ge=1)
    """Bytes a second that a client must take of a whole answer, after answer_chunk_s_max."""
    unpaid_requests_per_minute: int = Field(6_000, ge=1, le=1_000_000_000)
    """Requests that cost no tokens (refused ones, /models, /tokenize) that each key may send a minute to this process."""
    truncate: Literal["none", "end", "start"] = "none"
    """Which end of a text is cut that is too long, where neither its request nor its key says; none: it is an error."""
    token_encoding: Literal["model", "cl100k_base", "o200k_base"] | None = None
    """Whose token ids arrays in a request are that does not say: OpenAI's are decoded and tokenised anew; unset: the model's own, and another's are refused."""
    rerank_answer: Literal["results", "data"] = "results"
    """List of the scores in an answer to a rerank: results, as Novita and Jina have it, or data, as Voyage has."""
    request_s_max: float = Field(600.0, gt=0)
    """Seconds a whole request may take."""
    connections_max: int = Field(1024, ge=1)
    """Most connections at a time; more wait in the kernel's queue."""
    idle_s_max: int = Field(30, ge=1)
    """Seconds a connection may be silent between requests, or take to send a request's head."""
    page: bool = True
    """Serve the playground at /, the usage page at /usage and the API page at /docs."""


class QueueLimits(Section):
    """What may wait for the engine."""

    tokens_max: int = Field(1_200_000, ge=1)
    """Most tokens waiting for one model."""
    wait_s_max: float = Field(60.0, gt=0)
    """A request that fairness would make wait longer than this is refused at once."""
    always_requests: int = Field(64, ge=0)
    """While fewer requests than this wait for a model, and fewer tokens than always_tokens, none is refused."""
    always_tokens: int = Field(32_768, ge=0)
    """While fewer tokens than this wait for a model, and fewer requests than always_requests, none is refused."""
    first_batch_s_max: float = Field(300.0, gt=0)
    """Seconds within which a request's first batch must begin; at least wait_s_max."""

    @model_validator(mode="after")
    def _a_wait_that_is_admitted_is_allowed(self) -> Self:
        if self.first_batch_s_max < self.wait_s_max:
            raise ValueError(
                f"first_batch_s_max is {self.first_batch_s_max:g} s, below wait_s_max, "
                f"{self.wait_s_max:g} s: raise the first or lower the second"
            )
        return self


class BatchLimits(Section):
    """The Files and Batches APIs."""

    files: str | None = None
    """Folder, or fsspec URL as s3://bucket/folder, for files; unset: the folder files in the data folder."""
    tokens_per_day: int | None = Field(None, ge=1)
    """Most tokens in 24 hours that batches compute for one key, apart from its rate limits; what is more waits. Unset: no limit."""
    file_bytes_max: int = Field(200_000_000, ge=1024)
    """Largest file that may be uploaded."""
    key_bytes_max: int = Field(4096 * MEBIBYTE, ge=1024)
    """Most bytes that the files of one key may take before it can upload another."""
    key_files_max: int = Field(1_000, ge=1)
    """Most files of one key, outputs included, before it can upload another."""
    upload_s_max: float = Field(600.0, gt=0)
    """Seconds in which an upload must have arrived."""


class Life(Section):
    """How the process watches itself, and how it stops."""

    drain_grace_s: float = Field(5.0, ge=0)
    """Seconds it keeps answering after SIGTERM while it is no longer ready."""
    drain_s_max: float = Field(25.0, gt=0)
    """Seconds in which accepted requests must finish after that."""
    self_test_every_s: float = Field(30.0, gt=0)
    """Seconds between two self-tests: the vector of a fixed text must not change."""


class Telemetry(Section):
    """How the process is seen; `/metrics` has its own switch, `metrics_open`."""

    log_format: Literal["auto", "json", "text"] = "auto"
    """Form of a log line; auto is JSON unless stderr is a terminal."""
    trace_endpoint: str | None = None
    """Address that spans are sent to, OTLP over HTTP; needs the extra `tracing`."""


class Settings(Section):
    """All that `trivec serve` can be told."""

    models: Models = ()
    """Model to serve: a catalogue ID, a folder, or ID=FOLDER; unset: all-minilm-l6-v2. May be repeated."""
    aliases: Aliases = ()
    """Another name for a served model, as NAME=ID. May be repeated."""
    faces: Faces = ("batches", "cohere", "tei", "vllm", "ollama")
    """API to serve beside OpenAI's embeddings: batches (Files and Batches), cohere, tei, vllm or ollama; openai alone for none of them. May be repeated."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    probe_port: int | None = Field(None, ge=1, le=65535)
    """Port of its own for /livez, /readyz, /health and /metrics, over plain HTTP; for probes only."""
    tls_cert: Folder | None = None
    """Certificate chain in PEM; with it the server speaks HTTPS."""
    tls_key: Folder | None = None
    """The certificate's private key in PEM."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on."""
    backend: Literal["auto", "openvino", "torch", "fake"] = "auto"
    """What computes; auto is openvino on CPUs and torch on CUDA."""
    precision: Annotated[str, AfterValidator(_check_precision)] = "auto"
    """Arithmetic of the encoder: fp32, int8, bf16, fp16, an exact recipe of int8 as /models names it (int8-rows), or auto, the fastest that keeps the vectors."""
    data_dir: Folder = Path("~/.local/share/trivec")
    """Folder for the store, the server's secret and converted models."""
    database_url: SecretStr | None = None
    """Postgres instead of the SQLite file in the data folder: postgresql+psycopg://..."""
    api_key: SecretStr | None = None
    """One fixed key of at least 16 characters, for containers; scopes embed and admin."""
    secret: SecretStr | None = None
    """What keys are hashed under, at least 32 characters; else a file in the data folder."""
    no_auth: NoAuth = False
    """Serve without keys: true on a loopback address alone, "anywhere" on any, to all who reach it."""
    metrics_open: bool = False
    """Answer /metrics without an admin key."""
    api_processes: int = Field(1, ge=1, le=64)
    """Processes that speak HTTP; above 1 they stand before one more that runs the models."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged; info has one line a request, but for probes."""
    http: HttpLimits = HttpLimits()
    queue: QueueLimits = QueueLimits()
    batch: BatchLimits = BatchLimits()
    life: Life = Life()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.probe_port is not None and self.probe_port == self.port:
            raise ValueError(f"probe_port and port are both {self.port}; give probes another")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; give both or neither")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise ValueError(f"{file} is not a file; tls_cert and tls_key name PEM files")
        if self.no_auth is True and not is_loopback(self.host):
            raise ValueError(
                f"no_auth is only for a loopback address, and host is {self.host}; set host to "
                "127.0.0.1, or say --no-auth=anywhere if all who reach that address may use it"
            )
        if self.api_key is not None:
            _check_api_key(self.api_key.get_secret_value())
        return self


def _check_api_key(key: str) -> None:
    """Refuse a key that no `Authorization` header can carry as it is. Never shows the key."""
    if not API_KEY_CHARS_MIN <= len(key) <= API_KEY_CHARS_MAX:
        raise ValueError(
            f"api_key has {len(key)} characters; give it {API_KEY_CHARS_MIN} to "
            f"{API_KEY_CHARS_MAX:,}"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(
            "api_key has a blank, a line break or a character outside ASCII; "
            "give it printable ASCII alone (a file's last line break counts, too)"
        )


# Of bulk work, whose requests are whole shards: what waits is bounded by the shards at once.
BULK_LIMITS: Mapping[str, Any] = {
    "http": {"request_tokens_max": 1 << 31},
    "queue": {"tokens_max": 1 << 31, "wait_s_max": 1e9, "first_batch_s_max": 1e9},
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach *host*."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Names of the first edition, read for one release with a warning.
RENAMED: Mapping[str, str] = {
    **{f"line.{name}": f"queue.{name}" for name in QueueLimits.model_fields},
    "life.canary_every_s": "life.self_test_every_s",
}
_RESTARTS = "systemd, Compose or Kubernetes starts the server again; deploy/ has their files"
REMOVED: Mapping[str, str] = {"life.supervised": _RESTARTS, "life.heartbeat_s_max": _RESTARTS}


class _Given(NamedTuple):
    """A value that somebody gave to a setting."""

    value: object
    name: str  # as it was written: --port, TRIVEC_PORT or port
    origin: str  # where that was


def load_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> Settings:
    """Merge file, environment and *flags* (nested by section; None is unset) and check them.

    The file is what `config` among the flags, or `TRIVEC_CONFIG`, names. Raises `SettingInvalid`
    with one line that names the key as it was given, where that was, its value and what was
    expected. *warn* hears of variables that mean nothing to us.
    """
    variables = _variables(environ, warn)
    arguments = {
        path: _Given(value, flag_name(path), "on the command line")
        for path, value in _leaves(flags)
        if value is not None
    }
    named = arguments.pop("config", variables.pop("config", None))
    from_file = {} if named is None else _file_settings(str(named.value))
    given: dict[str, _Given] = {}  # by path
    for layer in (from_file, variables, arguments):
        for path, one in layer.items():
            if path in REMOVED:
                warn(f"{path} {one.origin} is no longer read: {REMOVED[path]}")
            elif path in RENAMED:
                warn(f"{path} {one.origin} is now called {RENAMED[path]}; please rename it")
                given[RENAMED[path]] = one
            else:
                given[path] = one
    tree: dict[str, Any] = {}
    for path, one in given.items():
        *sections, name = path.split(".")
        inner = tree
        for section in sections:
            if not isinstance(inner.get(section), dict):  # a plain value there gives way
                inner[section] = {}
            inner = inner[section]
        inner[name] = one.value
    try:
        return Settings.model_validate(tree)
    except ValidationError as refused:
        raise SettingInvalid(_sentence(refused.errors()[0], given)) from None


def setting_paths(section: type[BaseModel] = Settings) -> Iterator[str]:
    """The path of every setting, as `http.body_bytes_max`."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{name}.{rest}" for rest in setting_paths(inner))
        else:
            yield name


def variable_name(path: str) -> str:
    """The environment variable of the setting at *path*."""
    return ENVIRONMENT_PREFIX + path.replace(".", "__").upper()


def flag_name(path: str) -> str:
    """The flag of the setting at *path*, whatever the section that is in."""
    return OTHER_FLAGS.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))


def _variables(environ: Mapping[str, str], warn: Callable[[str], None]) -> dict[str, _Given]:
    paths = (*setting_paths(), *RENAMED, *REMOVED)
    known = {variable_name(path): path for path in paths} | OTHER_NAMES
    found: dict[str, _Given] = {}
    for name, value in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        if value.startswith("tcp://"):
            warn(
                f"{name}={value} is ignored: Kubernetes sets it for a service called trivec; "
                "set enableServiceLinks: false, or name the service otherwise"
            )
        elif name in known:
            found[known[name]] = _Given(value, name, "in the environment")
        elif name not in CLIENT_KEYS:
            warn(f"{name} is no setting of ours and is ignored{_did_you_mean(name, known)}")
    return found


def _file_settings(file: str) -> dict[str, _Given]:
    try:
        tree = tomllib.loads(Path(file).expanduser().read_text("utf-8"))
    except OSError as fault:
        raise SettingInvalid(
            f"cannot read the settings in {file}: {fault.strerror or fault}"
        ) from fault
    except ValueError as fault:  # TOML's own complaint, or bytes that are not UTF-8
        raise SettingInvalid(f"{file} is not TOML in UTF-8: {fault}") from fault
    return {path: _Given(value, path, f"in {file}") for path, value in _leaves(tree)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of *tree*, each by its path."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _sentence(fault: ErrorDetails, given: Mapping[str, _Given]) -> str:
    path = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):  # of several settings
        return f"{path}: {message}" if path else message
    one = next(  # given to the setting itself, within its section, or to a list that it is in
        one
        for at, one in given.items()
        if f"{at}.".startswith(f"{path}.") or path.startswith(f"{at}.")
    )
    if fault["type"] == "extra_forbidden":
        return f"unknown setting {path} {one.origin}{_did_you_mean(path, setting_paths())}"
    value = "***" if path in SECRETS else repr(fault["input"])
    expected = message.replace("Input should be", "must be").partition(", unable to parse")[0]
    return f"{one.name} is {value} {one.origin}; it {expected}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
