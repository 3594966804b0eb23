"""The images: their files please hadolint, and their health check follows the settings."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.clients.test_page import need
from tests.process.server import Server, clean_environment

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_hadolint_finds_nothing(name: str) -> None:
    need(HADOLINT.exists(), "hadolint comes with: make test-clients")
    run = subprocess.run(
        [str(HADOLINT), str(DEPLOY / name)], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "")


def checked(**environ: str) -> int:
    command = [sys.executable, str(DEPLOY / "healthcheck.py")]
    return subprocess.run(command, env=clean_environment(environ), check=False).returncode


def test_the_health_check_asks_the_port_that_the_settings_say(
    server: Server, tmp_path: Path
) -> None:
    port = server.url.rpartition(":")[2]
    config = tmp_path / "trivec.toml"
    config.write_text(f"port = {port}\n")
    assert checked(TRIVEC_PORT=port) == 0
    assert checked(TRIVEC_CONFIG=str(config)) == 0
    assert checked(TRIVEC_PORT="1", TRIVEC_PROBE_PORT=port) == 0
    assert checked(TRIVEC_PORT=port, TRIVEC_PROBE_PORT="1") == 1
