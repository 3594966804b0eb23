"""What cannot start says so in one line and leaves with 2, never with a traceback."""

import socket
from pathlib import Path

import pytest
from tests.process.server import refused

pytestmark = pytest.mark.process


def test_a_bad_flag() -> None:
    assert "--port is '70000'" in refused("--port", "70000")


def test_a_bad_variable() -> None:
    line = refused(environ={"TRIVEC_HTTP__INPUTS_MAX": "many"})
    assert "TRIVEC_HTTP__INPUTS_MAX is 'many'" in line


def test_an_unknown_key_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "trivec.toml"
    file.write_text("prot = 8000\n")
    assert "unknown setting prot" in refused("--config", str(file))


def test_no_keys_where_others_can_reach_it() -> None:
    assert "--no-auth=anywhere" in refused("--no-auth", "--host", "0.0.0.0")


def test_no_keys_anywhere_is_said_in_one_word(tmp_path: Path) -> None:
    arguments = ("--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path))
    line = refused("--no-auth=anywhere", *arguments, "--model", "nobody/knows-it")
    assert "nobody/knows-it" in line, "the address was no reason to refuse"


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("--port", port, "--data-dir", str(tmp_path), "--backend", "fake")
    assert port in line
    assert "--port" in line


def test_an_unknown_model(tmp_path: Path) -> None:
    line = refused("--port", "0", "--model", "nobody/knows-it", "--data-dir", str(tmp_path))
    assert "nobody/knows-it" in line


def test_a_data_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused("--port", "0", "--data-dir", str(tmp_path / "file" / "inside"))
    assert "--data-dir" in line


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("nothing\n")
    line = refused(
        *("--port", "0", "--tls-cert", str(tmp_path / "cert.pem")),
        *("--tls-key", str(tmp_path / "key.pem")),
    )
    assert "tls_cert" in line
