"""Our own listening socket, and a look at the certificate before anything is loaded.

The socket is ours, so that a port in use is one clear line, port 0 is known from the start, and a
server process that is started again inherits the connections that wait.
"""

import os
import socket
import ssl
from pathlib import Path

from trivec.core.errors import SettingInvalid

BACKLOG = 1024  # connections the kernel accepts before we do


def listen(host: str, port: int, *, shared: bool = False, flag: str = "--port") -> socket.socket:
    """A listening socket on *host* and *port* (0: a free one). Raises `SettingInvalid`.

    *shared*: others of this process may listen there, too, and the kernel deals connections out.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as fault:
        raise SettingInvalid(f"--host {host} is no address: {fault.strerror}") from fault
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as fault:
        listener.close()
        raise SettingInvalid(
            f"cannot listen on {host}:{port}: {os.strerror(fault.errno or 0)}. "
            f"Choose another {flag}" + (", or 0 for a free one." if flag == "--port" else ".")
        ) from fault
    listener.setblocking(False)
    return listener


def listen_shared(host: str, port: int, *, count: int) -> list[socket.socket]:
    """*count* sockets on one port, a process each. Raises `SettingInvalid`."""
    with listen(host, port) as alone:  # which a port that somebody else shares would refuse
        port = alone.getsockname()[1]
    return [listen(host, port, shared=True) for _ in range(count)]


def listen_unix(path: Path) -> socket.socket:
    """A socket of this machine at *path*, for other processes of ours. Raises `SettingInvalid`."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as fault:  # most often a path of more than 107 bytes
        listener.close()
        raise SettingInvalid(
            f"cannot make a socket at {path}: {fault.strerror or fault}. "
            "Set TMPDIR to a folder with a short path that can be written."
        ) from fault
    listener.setblocking(False)
    return listener


def check_certificate(cert: Path, key: Path) -> None:
    """Refuse a certificate and key that TLS could not start with, in one line."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as fault:
        raise SettingInvalid(
            f"--tls-cert {cert} and --tls-key {key} do not work together: {fault}"
        ) from fault


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a password")
