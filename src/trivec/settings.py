"""One frozen tree of settings, built once at the entrance; each room receives only its section.

Flags win over the environment (`TRIVEC_*`), the environment over the file, the file over the
defaults here. It knows names, defaults and help; not what they do. Nothing else reads the
environment.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

MEBIBYTE = 1024 * 1024


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HttpLimits(Section):
    """Bounds of one request and of one connection."""

    body_bytes_max: int = Field(8 * MEBIBYTE, ge=1024)
    """Largest request body."""
    body_s_max: float = Field(30.0, gt=0)
    """Seconds in which a request body must have arrived."""
    body_chunks_max: int = Field(4096, ge=1)
    """Most pieces a request body may arrive in."""
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
    request_s_max: float = Field(600.0, gt=0)
    """Seconds a whole request may take."""
    connections_max: int = Field(1024, ge=1)
    """Most connections at a time."""


class LineBound(Section):
    """What may wait for the engine."""

    tokens_max: int = Field(1_200_000, ge=1)
    """Most tokens waiting for one model."""
    wait_s_max: float = Field(10.0, gt=0)
    """A request that fairness would make wait longer than this is refused at once."""
    first_batch_s_max: float = Field(30.0, gt=0)
    """Seconds within which a request's first batch must begin."""


class Life(Section):
    """How the process stops."""

    drain_grace_s: float = Field(5.0, ge=0)
    """Seconds it keeps answering after SIGTERM while it is no longer ready."""
    drain_s_max: float = Field(25.0, gt=0)
    """Seconds in which accepted requests must finish after that."""


class Settings(Section):
    """All that `trivec serve` can be told."""

    models: tuple[str, ...] = ()
    """Model to serve: a catalogue ID, a folder, or ID=FOLDER. May be repeated."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    tls_cert: Path | None = None
    """Certificate chain in PEM; with it the server speaks HTTPS."""
    tls_key: Path | None = None
    """The certificate's private key in PEM."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on."""
    backend: Literal["auto", "openvino", "torch", "fake"] = "auto"
    """Engine to run with; auto is openvino on CPUs and torch on CUDA."""
    precision: Literal["auto", "fp32", "int8", "bf16", "fp16"] = "auto"
    """Arithmetic of the encoder; auto takes the fastest that keeps the vectors."""
    data_dir: Path = Path("~/.local/share/trivec")
    """Folder for the store, the server's secret and converted models."""
    database_url: SecretStr | None = None
    """Postgres instead of the SQLite file in the data folder: postgresql+psycopg://..."""
    api_key: SecretStr | None = None
    """One fixed key of at least 16 characters, for containers; scopes embed and admin."""
    no_auth: bool = False
    """Serve without keys; only on a loopback address."""
    metrics_open: bool = False
    """Answer /metrics without an admin key."""
    http: HttpLimits = HttpLimits()
    line: LineBound = LineBound()
    life: Life = Life()
