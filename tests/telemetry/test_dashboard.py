"""The Grafana dashboard asks only for metrics and labels that there are, and shows every one."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tests.telemetry.events import every_kind, every_load

from trivec.telemetry import Metrics

FILE = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"


def expressions() -> list[str]:
    panels = json.loads(FILE.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def exposed() -> dict[str, set[str]]:
    """Every name on the page, histograms' suffixes included, with its labels."""
    metrics = Metrics()
    metrics.watch(every_load)
    for event in every_kind():
        metrics.observe(event)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(metrics.page().decode())
        if not family.documentation.startswith("Deprecated")
        for sample in family.samples
    }


def test_every_panel_asks_for_metrics_that_there_are() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"trivec_\w+", expression)}
    assert asked - set(exposed()) == set()


def test_every_label_asked_for_belongs_to_its_metric() -> None:
    known = exposed()
    for expression in expressions():
        for name, selector in re.findall(r"(trivec_\w+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)=~?\"", selector)) - {"instance"}
            assert labels <= known[name], expression


def test_every_metric_is_on_the_dashboard() -> None:
    text = " ".join(expressions())
    names = {
        re.sub("_(bucket|sum|count)$", "", name) for name in exposed() if "process" not in name
    }
    assert [name for name in sorted(names) if name not in text] == []


def test_panels_do_not_lie_on_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(FILE.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
