"""The Ray Serve application beside the plain server, on the same cores.

`python -m tests.soak.ray_throughput [--seconds 8] [--rounds 7] [--precision int8] [--proxy haproxy]`

Four clients send requests of 64 texts to `trivec serve` and to the application by turns, each with
keys, a ledger and the same model. Ray's processes are up all the time, as on a machine of a cluster.
Its proxy is `haproxy`, which Ray brings along, or `python`, its default.
"""

import os
import re
import secrets
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.figures import Spread, ratio
from benchmarks.harness import Shape, Target, free_port, measure, own_server
from benchmarks.texts import sentences
from tests.cluster.nodes import ray_nodes
from tests.soak.report import Report, command

from trivec.cluster.serve import ServeArguments, app
from trivec.server.machine import usable_cores

MODEL = "all-minilm-l6-v2"
SHARE_MIN = 0.9
WARM_S = 2.0
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
CPUS_MORE = 2  # that Ray is told of beside the model's: bookkeeping for the ingress


@contextmanager
def ray_application(folder: Path, *, precision: str, cores: int) -> Iterator[Target]:
    """The application on a cluster of one node; the model has all of *cores*."""
    import ray
    from ray import serve

    port, key = free_port(), secrets.token_urlsafe(24)
    arguments = ServeArguments(
        models=(MODEL,),
        settings={"precision": precision, "data_dir": str(folder), "api_key": key},
        cpus=cores,
        ingress_cpus=1,
    )
    with ray_nodes(cpus=cores + CPUS_MORE) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            serve.start(proxy_location="HeadOnly", http_options={"port": port, "host": "127.0.0.1"})
            serve.run(app(arguments))
            yield Target(f"http://127.0.0.1:{port}/v1", MODEL, key)
        finally:
            serve.shutdown()
            ray.shutdown()


def processor_s() -> dict[str, float]:
    """Processor time of each kind of process on this machine, by its name."""
    found: dict[str, float] = defaultdict(float)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                words = (folder / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue
            name = words.split(" ", 1)[0].rpartition("/")[2]
            if name.startswith("ray::"):
                name = re.sub(r"[#.].*", "", name)  # of the replica, of the method that runs now
            elif name.startswith("python"):
                name = words.partition(" -m ")[2].partition(" --")[0] or "other Python"
            found[name] += (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND
    return found


def run(
    seconds: float, rounds: int, precision: str, proxy: str, clients: int, texts: int
) -> Report:
    os.environ |= {  # of Ray's processes
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(proxy == "haproxy")),
        "RAY_worker_niceness": "0",  # as the plain server's; by default they give way to all else
    }
    shape, asked = Shape(clients, texts), sentences(16 * texts)
    rates: dict[str, list[float]] = {"plain": [], "ray": []}
    used: dict[str, dict[str, float]] = {"plain": defaultdict(float), "ray": defaultdict(float)}
    count = Counter[str]()
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trivec-ray-")))
        arguments = ("--precision", precision)
        plain = own_server(MODEL, data_dir=data / "plain", arguments=arguments)
        ours = ray_application(data / "ray", precision=precision, cores=usable_cores())
        targets = {"plain": stack.enter_context(plain), "ray": stack.enter_context(ours)}
        for number in range(rounds + 1):  # the first warms up
            for name, target in targets.items():
                before = processor_s()
                lasts_s = seconds if number else WARM_S
                answers = measure(target, shape, asked, duration_s=lasts_s)
                if number:
                    rates[name].append(answers.rate * texts)
                    for one, s in processor_s().items():
                        used[name][one] += s - before.get(one, 0.0)
                    count[name] += len(answers.latencies_s)
                    print(f"{name}: {rates[name][-1]:.0f} texts/s", file=sys.stderr, flush=True)
    report = Report()
    share = ratio(rates["ray"], rates["plain"])
    report.at_least("texts a second of the plain server's", share.median, SHARE_MIN)
    report.figures = {
        "share": str(share),
        "texts_a_second": {name: str(Spread.of(found)) for name, found in rates.items()},
        "processor_ms_a_request": {
            name: {
                one: round(1e3 * s / count[name], 2)
                for one, s in sorted(used[name].items(), key=lambda pair: -pair[1])
                if s > 0.005 * seconds * rounds
            }
            for name in used
        },
    }
    return report


if __name__ == "__main__":
    command(
        "ray-throughput",
        __doc__,
        run,
        seconds=8.0,
        rounds=7,
        precision="int8",
        proxy="haproxy",
        clients=4,
        texts=64,
    )
