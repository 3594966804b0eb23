"""One frozen tree of settings, built once at the entrance; each package receives only its section.

Flags win over the environment (`TRIVEC_*`), the environment over the file, the file over the
defaults here. It knows names, defaults and help; not what they do. Nothing else reads the
environment.
"""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

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
NESTING = "__"
OTHER_NAMES = {"TRIVEC_MODEL": "models", "TRIVEC_CONFIG": "config"}
# Names of the first edition, read for one release with a warning.
RENAMED_SECTIONS: Mapping[str, str] = {"line": "queue"}
RENAMED: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("life", "canary_every_s"): ("life", "self_test_every_s")
}
_RESTARTS = "systemd, Compose or Kubernetes starts the server again; deploy/ has their files"
REMOVED: Mapping[tuple[str, ...], str] = {
    ("life", "supervised"): _RESTARTS,
    ("life", "heartbeat_s_max"): _RESTARTS,
}


def _split_at_commas(value: object) -> object:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


def _as_bool(value: object) -> object:
    """*value* as a truth where pydantic has one for it, else as it is."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return value


NoAuth: TypeAlias = Annotated[Literal[False, True, "anywhere"], BeforeValidator(_as_bool)]
PRECISIONS = ("auto", "fp32", "int8", "bf16", "fp16")


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
FaceName: TypeAlias = Literal["openai", "cohere", "tei", "vllm", "ollama"]
Faces: TypeAlias = Annotated[tuple[FaceName, ...], BeforeValidator(_split_at_commas)]
Folder: TypeAlias = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class HttpLimits(Section):
    """Bounds of one request and of one connection."""

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
    request_s_max: float = Field(600.0, gt=0)
    """Seconds a whole request may take."""
    connections_max: int = Field(1024, ge=1)
    """Most connections at a time; more wait in the kernel's queue."""
    idle_s_max: int = Field(30, ge=1)
    """Seconds a connection may be silent between requests, or take to send a request's head."""


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
    """Model to serve: a catalogue ID, a folder, or ID=FOLDER. May be repeated."""
    aliases: Aliases = ()
    """Another name for a served model, as NAME=ID. May be repeated."""
    faces: Faces = ("cohere", "tei", "vllm", "ollama")
    """API to serve beside OpenAI's: cohere, tei, vllm or ollama; openai alone for none of them. May be repeated."""
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
    """Engine to run with; auto is openvino on CPUs and torch on CUDA."""
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
    if len(key) < API_KEY_CHARS_MIN:
        raise ValueError(f"api_key is too short; give it at least {API_KEY_CHARS_MIN} characters")
    if len(key) > API_KEY_CHARS_MAX:
        raise ValueError(
            f"api_key has {len(key)} characters; give it at most {API_KEY_CHARS_MAX:,}"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(
            "api_key has a blank, a line break or a character outside ASCII; "
            "give it printable ASCII alone (a file's last line break counts, too)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach *host*."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> Settings:
    """Merge file, environment and *flags* (nested by section; None is unset) and check them.

    The file is what `config` among the flags, or `TRIVEC_CONFIG`, names. Raises `SettingInvalid`
    with one line that names the key, where it came from, its value and what was expected.
    *warn* hears of variables that mean nothing to us.
    """
    variables = dict(_variables(environ, warn))
    given = {path: value for path, value in _leaves(flags) if value is not None}
    from_flag = given.pop(("config",), None)
    from_variable = variables.pop(("config",), None)
    config = from_flag if from_flag is not None else from_variable

    merged: dict[str, Any] = {}
    origins: dict[tuple[str, ...], str] = {}
    layers = (
        (f"in {config}", _file_leaves(Path(config)) if config is not None else ()),
        ("in the environment", variables.items()),
        ("on the command line", given.items()),
    )
    for origin, leaves in layers:
        for named, value in leaves:
            path = _current_path(named, origin, warn)
            if path is not None:
                _put(merged, path, value)
                origins[path] = origin
    try:
        return Settings.model_validate(merged)
    except ValidationError as refused:
        raise SettingInvalid(_sentence(refused.errors()[0], origins)) from None


def _current_path(
    path: tuple[str, ...], origin: str, warn: Callable[[str], None]
) -> tuple[str, ...] | None:
    """Where the setting at *path* is now; None where it is no longer read. Warns of old names."""
    if path in REMOVED:
        warn(f"{'.'.join(path)} {origin} is no longer read: {REMOVED[path]}")
        return None
    if path in RENAMED:
        current = RENAMED[path]
    elif path[0] in RENAMED_SECTIONS and len(path) > 1:
        current = (RENAMED_SECTIONS[path[0]], *path[1:])
    else:
        return path
    warn(f"{'.'.join(path)} {origin} is now called {'.'.join(current)}; please rename it")
    return current


def setting_paths(section: type[BaseModel] = Settings) -> Iterator[tuple[str, ...]]:
    """The path of every setting, as `("http", "body_bytes_max")`."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from ((name, *rest) for rest in setting_paths(inner))
        else:
            yield (name,)


def _variables(
    environ: Mapping[str, str], warn: Callable[[str], None]
) -> Iterator[tuple[tuple[str, ...], str]]:
    known = {variable_name(path): path for path in setting_paths()}
    known |= {name: (setting,) for name, setting in OTHER_NAMES.items()}
    for old, new in RENAMED_SECTIONS.items():
        known |= {
            variable_name((old, *path[1:])): (old, *path[1:])
            for path in setting_paths()
            if path[0] == new
        }
    known |= {variable_name(path): path for path in (*RENAMED, *REMOVED)}
    for name, value in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        if value.startswith("tcp://"):
            warn(
                f"{name}={value} is ignored: Kubernetes sets it for a service called trivec; "
                "set enableServiceLinks: false, or name the service otherwise"
            )
        elif name in known:
            yield known[name], value
        else:
            warn(f"{name} is no setting of ours and is ignored{_did_you_mean(name, known)}")


def variable_name(path: tuple[str, ...]) -> str:
    """The environment variable of the setting at *path*."""
    return ENVIRONMENT_PREFIX + NESTING.join(path).upper()


def _file_leaves(file: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
    try:
        tree = tomllib.loads(file.expanduser().read_text("utf-8"))
    except OSError as fault:
        raise SettingInvalid(
            f"cannot read the settings in {file}: {fault.strerror or fault}"
        ) from fault
    except ValueError as fault:  # TOML's own complaint, or bytes that are not UTF-8
        raise SettingInvalid(f"{file} is not TOML in UTF-8: {fault}") from fault
    yield from _leaves(tree)


def _leaves(
    tree: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _put(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    *sections, name = path
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):  # a plain value where a section belongs gives way
            inner = tree[section] = {}
        tree = inner
    tree[name] = value


def _sentence(fault: ErrorDetails, origins: Mapping[tuple[str, ...], str]) -> str:
    path = tuple(str(part) for part in fault["loc"])
    if not path:
        return fault["msg"].removeprefix("Value error, ")
    key = ".".join(path)
    origin = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)
    if origin is None:
        origin = next(where for at, where in origins.items() if at[: len(path)] == path)
    if fault["type"] == "extra_forbidden":
        known = [".".join(one) for one in setting_paths()]
        return f"unknown setting {key} {origin}{_did_you_mean(key, known)}"
    if origin == "in the environment":
        key = variable_name(path)
    elif origin == "on the command line":
        key = "--" + key.replace("_", "-")
    value = "***" if path[0] in ("api_key", "database_url", "secret") else repr(fault["input"])
    expected = fault["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    expected = expected.partition(", unable to parse")[0]
    return f"{key} is {value} {origin}; it {expected}"


def _did_you_mean(name: str, known: "Mapping[str, object] | list[str]") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
