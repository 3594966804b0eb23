"""The peers' environments: one each, from the package index, outside of the repository.

Run: python -m benchmarks.against.environments [--envs DIR] [PEER ...]

A peer's packages never meet ours: several of them need versions that exclude each other.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path
from types import MappingProxyType

ENVS = Path("~/.cache/trivec-bench/envs").expanduser()

# Exact versions, so that a comparison can be repeated; torch takes its CPU build where the index has it.
REQUIREMENTS = MappingProxyType(
    {
        "sentence-transformers": ("torch==2.13.0", "sentence-transformers==6.2.0"),
        "flagembedding": ("torch==2.13.0", "FlagEmbedding==1.4.2"),
        "onnxruntime": (
            "torch==2.13.0",
            "transformers==5.23.0",
            "onnx==1.23.2",
            "onnxruntime==1.32.0",
        ),
        "ctranslate2": ("torch==2.13.0", "transformers==4.57.6", "ctranslate2==4.8.5"),
        "llama-cpp": (
            "torch==2.13.0",
            "llama-cpp-python==0.3.36",
            "gguf==0.19.0",
            "tokenizers==0.23.3",
            "safetensors==0.8.0",
        ),
        "infinity": ("torch==2.13.0", "infinity-emb[server,torch]==0.0.78"),
    }
)


def python_of(name: str, envs: Path) -> Path:
    """The interpreter of a peer's environment, which need not exist."""
    return envs / name / "bin" / "python"


def make(name: str, envs: Path) -> Path:
    """Make the environment of *name* unless it is there already; its interpreter."""
    python = python_of(name, envs)
    done = envs / name / ".complete"
    if done.exists():
        return python
    print(f"making {envs / name}", file=sys.stderr)
    venv.create(envs / name, with_pip=True, clear=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], check=True)
    done.touch()
    return python


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--envs", type=Path, default=ENVS, help="folder of the environments")
    arguments.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(REQUIREMENTS))
    given = arguments.parse_args()
    unknown = set(given.peers) - set(REQUIREMENTS)
    if unknown:
        arguments.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(REQUIREMENTS)}")
    for name in given.peers or REQUIREMENTS:
        print(make(name, given.envs))


if __name__ == "__main__":
    main()
