"""Ask `/readyz` of the server in this container, where the settings say that it listens.

Settings are those of the environment and of the file in TRIVEC_CONFIG: give ports and certificates
there, and not as arguments. Exit code 1 where it is not ready.
"""

import os
import ssl
import sys
from urllib.error import URLError
from urllib.request import urlopen

from trivec.settings import load_settings

settings = load_settings({}, os.environ)
is_plain = settings.probe_port is not None or settings.tls_cert is None
address = f"{'http' if is_plain else 'https'}://127.0.0.1:{settings.probe_port or settings.port}"
try:
    # To itself: its certificate is of another name.
    any_name = ssl._create_unverified_context()  # noqa: S323
    urlopen(f"{address}/readyz", timeout=3, context=any_name)  # noqa: S310
except URLError as fault:  # refused, or answered 503
    sys.exit(f"{address}/readyz: {fault}")
