"""The alert rules ask for what the server exposes, each has its entry on the page, and each fires."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.telemetry.test_dashboard import exposed

from trivec.api.errors import TABLE

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
VALUES = {  # of the labels that come from closed sets
    "phase": {"loading", "ready", "draining", "stopped"},
    "outcome": {"ok", "failed", "recovered", "lost"},
    "status": {"2xx", "4xx", "5xx", "other"},
    "route": {"/embeddings"},
    "job": {"trivec"},
}
# Of the scraper, and of the process itself.
OTHERS = {"up": {"job"}, "process_start_time_seconds": {"job"}, "process_open_fds": {"job"}}
OTHERS |= {"process_max_fds": {"job"}}
RISING = "0+10x60"
# What makes each fire: series by the minute, for an hour.
SERIES = {
    "TrivecDown": ['up{job="trivec"} 0x60'],
    "TrivecNotReady": ['trivec_phase{phase="ready"} 0x60', 'trivec_phase{phase="loading"} 1x60'],
    "TrivecRestarts": ['process_start_time_seconds{job="trivec"} 0+120x60'],
    "TrivecStoreUnavailable": [f'trivec_refusals_total{{reason="store_unavailable"}} {RISING}'],
    "TrivecFaults": [f'trivec_refusals_total{{reason="internal_error"}} {RISING}'],
    "TrivecBatchesFailed": [f'trivec_batches_total{{outcome="failed",model="m"}} {RISING}'],
    "TrivecRowsNotFinite": [f'trivec_rows_not_finite_total{{outcome="lost",model="m"}} {RISING}'],
    "TrivecOverloaded": [f'trivec_refusals_total{{reason="overloaded"}} {RISING}'],
    "TrivecQueueLong": ['trivec_queue_seconds{model="m"} 11x60'],
    "TrivecSlow": [
        'trivec_request_duration_seconds_bucket{route="/embeddings",status="2xx",le="10"} 0x60',
        f'trivec_request_duration_seconds_bucket{{route="/embeddings",status="2xx",le="60"}} {RISING}',
        f'trivec_request_duration_seconds_bucket{{route="/embeddings",status="2xx",le="+Inf"}} {RISING}',
    ],
    "TrivecOpenFiles": [
        'process_open_fds{job="trivec"} 9x60',
        'process_max_fds{job="trivec"} 10x60',
    ],
    "TrivecLogLinesDropped": [f"trivec_log_lines_dropped_total {RISING}"],
}


def rules() -> dict[str, Any]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def known_values() -> dict[str, set[str]]:
    codes = {row.code or row.type for row in TABLE.values()} | {"client_gone"}
    return {**VALUES, "reason": codes}


@pytest.mark.parametrize("name", rules())
def test_a_rule_asks_for_metrics_labels_and_values_that_there_are(name: str) -> None:
    expression = str(rules()[name]["expr"])
    known = exposed() | OTHERS
    names = re.findall(r"\b(?:trivec|process)_\w+|\bup\b", expression)
    assert names
    assert set(names) <= set(known)
    for metric, selector in re.findall(r"(\w+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            assert label in known[metric]
            assert set(value.split("|")) <= known_values()[label]


def test_every_alert_has_an_entry_on_the_page_and_the_page_no_other() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/alerts.md").read_text("utf-8"), re.M)
    assert headings == list(rules())


@pytest.mark.skipif(PROMTOOL is None, reason="promtool comes with Debian's prometheus")
def test_every_alert_fires_on_its_series_alone(tmp_path: Path) -> None:
    assert set(SERIES) == set(rules())
    tests = []
    for name, series in SERIES.items():
        given = [dict(zip(("series", "values"), one.rsplit(" ", 1), strict=True)) for one in series]
        expression = str(rules()[name]["expr"])
        labels = {"severity": rules()[name]["labels"]["severity"]}
        labels |= {"model": "m"} if "by (instance, model)" in expression else {}
        labels |= {"job": "trivec"} if "by" not in expression else {}
        expected = [{"exp_labels": labels, "exp_annotations": {}}]
        asked = [
            {"eval_time": "40m", "alertname": one, "exp_alerts": expected if one == name else []}
            for one in SERIES
        ]
        tests.append({"interval": "1m", "input_series": given, "alert_rule_test": asked})
    file = tmp_path / "alerts_test.yml"
    bare = yaml.safe_load(RULES.read_text("utf-8"))
    for rule in bare["groups"][0]["rules"]:
        del rule["annotations"]
    (tmp_path / "bare.yml").write_text(yaml.safe_dump(bare))
    file.write_text(yaml.safe_dump({"rule_files": ["bare.yml"], "tests": tests}))
    scrapes = [str(RULES.parent / name) for name in ("prometheus.yml", "monitoring/prometheus.yml")]
    checks = [["check", "rules", str(RULES)], ["check", "config", "--syntax-only", *scrapes]]
    for command in (*checks, ["test", "rules", str(file)]):
        run = subprocess.run([str(PROMTOOL), *command], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
