"""The Helm chart, by Helm itself: what it makes of its values, and which values it refuses.

Kubernetes' own resources are checked against its published schemas; those of Prometheus' and KEDA's
operators have none here, so their fields are compared with what the operators' pages say.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.telemetry.events import every_kind, every_load

from trivec.settings import Life, load_settings
from trivec.telemetry import Metrics

helm = pytest.importorskip("helm_python", reason="needs the group `clients`")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "trivec"
KUBERNETES = ("1.31", "1.37")
OF_OPERATORS = {"ServiceMonitor", "ScaledObject"}
EVERYTHING: Mapping[str, Any] = {
    "models": ["baai/bge-m3"],
    "pull": ["baai/bge-m3"],
    "hubTokenSecret": "hub",
    "device": "nvidia.com/gpu",
    "env": {"TRIVEC_API_PROCESSES": "3"},
    "imagePullSecrets": [{"name": "registry"}],
    "persistence": {"enabled": True, "storageClass": "fast"},
    "autoscaling": {"kind": "hpa", "tokensPerSecond": 5_000_000},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {
        "clients": [{"podSelector": {"matchLabels": {"app": "search"}}}],
        "egress": [{"ports": [{"port": 4318, "protocol": "TCP"}]}],
    },
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "nodeSelector": {"e": "f"},
    "tolerations": [{"operator": "Exists"}],
    "runtimeClassName": "nvidia",
}
KEDA: Mapping[str, Any] = {**EVERYTHING, "autoscaling": {"kind": "keda", "tokensPerSecond": 500}}
SQLITE: Mapping[str, Any] = {
    "database": {"enabled": False},
    "replicas": 1,
    "persistence": {"enabled": True, "accessMode": "ReadWriteOnce"},
}
CHOICES = pytest.mark.parametrize(
    "values", [{}, EVERYTHING, KEDA, SQLITE], ids=["defaults", "everything", "keda", "sqlite"]
)


def rendered(values: Mapping[str, Any], name: str = "trivec") -> dict[str, dict[str, Any]]:
    """Every resource by kind and name; no two have both."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(dict(values), name=name, namespace="search")
    found = [
        resource
        for file, text in files.items()
        if file.endswith(".yaml")
        for resource in yaml.safe_load_all(text)
        if resource
    ]
    named = {f"{one['kind']}/{one['metadata']['name']}": one for one in found}
    assert len(named) == len(found)
    return named


def pod(values: Mapping[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = rendered(values)["Deployment/trivec"]["spec"]["template"]["spec"]
    return spec


def server(values: Mapping[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod(values)["containers"][0]
    return container


def settings_of(container: Mapping[str, Any]) -> Any:
    """What the server makes of its arguments and variables."""
    environ = {one["name"]: one.get("value", "x" * 32) for one in container["env"]}
    environ["TRIVEC_DATABASE_URL"] = "postgresql://u:p@h/d"
    assert container["args"][0] == "serve"
    models = container["args"][2::2]
    warned: list[str] = []
    settings = load_settings({"models": tuple(models)}, environ, warn=warned.append)
    assert warned == []
    return settings


def test_helm_has_nothing_to_say_but_that_there_is_no_icon() -> None:
    report = helm.lint(CHART, strict=True)
    assert (report["total_charts_linted"], report["errors"]) == (1, [])
    assert [one["error"] for one in report["messages"]] == ["icon is recommended"]


@CHOICES
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_resource_fits_the_schemas_of_kubernetes(
    values: Mapping[str, Any], version: str
) -> None:
    for resource in rendered(values).values():
        if resource["kind"] not in OF_OPERATORS:
            kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_plain_manifest_fits_them_too(version: str) -> None:
    for resource in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8")):
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_plain_manifest_is_what_the_chart_makes_of_its_defaults() -> None:
    plain = {
        one["kind"]: one
        for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    }
    chart = {one["kind"]: one for one in rendered({}).values()}
    assert plain["Service"]["spec"]["ports"] == chart["Service"]["spec"]["ports"]
    budget = "PodDisruptionBudget"
    assert plain[budget]["spec"]["maxUnavailable"] == chart[budget]["spec"]["maxUnavailable"]
    ours, theirs = plain["Deployment"]["spec"], chart["Deployment"]["spec"]
    assert ours["strategy"] == theirs["strategy"]
    assert ours["replicas"] == theirs["replicas"]
    ours, theirs = ours["template"]["spec"], theirs["template"]["spec"]
    [our_server], [their_server] = ours.pop("containers"), theirs.pop("containers")
    del ours["restartPolicy"]  # said for the reader: it is Kubernetes' own
    assert ours == theirs
    # The secret as a whole, an image of this machine, and the server's own times to drain.
    for apart in ("image", "imagePullPolicy", "env", "envFrom"):
        our_server.pop(apart, None)
        their_server.pop(apart, None)
    assert our_server == their_server


@CHOICES
def test_the_server_knows_every_variable_and_argument(values: Mapping[str, Any]) -> None:
    settings = settings_of(server(values))
    assert settings.models == tuple(values.get("models", ["all-minilm-l6-v2"]))
    assert settings.device == ("cuda" if "device" in values else "cpu")


def test_the_defaults_drain_as_the_server_does_by_itself() -> None:
    life = settings_of(server({})).life
    assert (life.drain_grace_s, life.drain_s_max) == (Life().drain_grace_s, Life().drain_s_max)


@pytest.mark.parametrize("drain", [{}, {"preStop": 20, "grace": 1, "max": 600}], ids=str)
def test_a_pod_is_killed_only_after_its_drain(drain: Mapping[str, int]) -> None:
    spec = pod({"drain": drain})
    [container] = spec["containers"]
    life = settings_of(container).life
    before_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drained_s = before_s + life.drain_grace_s + life.drain_s_max
    assert spec["terminationGracePeriodSeconds"] >= drained_s + 10, "docs/operations.md"


@CHOICES
def test_nothing_runs_as_root_or_may_write_outside_its_volumes(values: Mapping[str, Any]) -> None:
    specs = [
        one["spec"]["template"]["spec"]
        for one in rendered(values).values()
        if one["kind"] in ("Deployment", "Job")
    ]
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["automountServiceAccountToken"] is False
        assert "affinity" not in spec
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {one["mountPath"] for one in container["volumeMounts"]} == {"/data", "/tmp"}


def test_a_gpu_is_asked_for_beside_the_other_resources() -> None:
    limits = server({"device": "nvidia.com/gpu", "gpus": 2})["resources"]["limits"]
    assert limits == {"memory": "4Gi", "nvidia.com/gpu": 2}
    assert server({})["resources"]["limits"] == {"memory": "4Gi"}


def test_secrets_come_from_where_the_values_say() -> None:
    values = {"secret": {"name": "keys"}, "database": {"secretName": "pg-app", "urlKey": "uri"}}
    references = {
        one["name"]: one["valueFrom"]["secretKeyRef"]
        for one in server(values)["env"]
        if "valueFrom" in one
    }
    assert references == {
        "TRIVEC_API_KEY": {"name": "keys", "key": "TRIVEC_API_KEY"},
        "TRIVEC_SECRET": {"name": "keys", "key": "TRIVEC_SECRET"},
        "TRIVEC_DATABASE_URL": {"name": "pg-app", "key": "uri"},
    }
    job = rendered(values)["Job/trivec-db-upgrade"]
    [upgrade] = job["spec"]["template"]["spec"]["containers"]
    assert upgrade["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "pg-app", "key": "uri"}
    assert "ConfigMap" not in " ".join(rendered(values))


def test_models_are_fetched_before_the_server_starts_into_what_it_reads() -> None:
    spec = pod({"pull": ["baai/bge-m3", "intfloat/e5-small-v2"], "hubTokenSecret": "hub"})
    assert [one["command"][-1] for one in spec["initContainers"]] == [
        "baai/bge-m3",
        "intfloat/e5-small-v2",
    ]
    for init in spec["initContainers"]:
        assert init["env"][-1]["valueFrom"]["secretKeyRef"]["name"] == "hub"
        assert init["volumeMounts"] == spec["containers"][0]["volumeMounts"]


def shown_metrics() -> set[str]:
    metrics = Metrics()
    metrics.watch(every_load)
    for event in every_kind():
        metrics.observe(event)
    page = metrics.page().decode()
    return {family.name for family in text_string_to_metric_families(page)}


def test_the_hpa_scales_on_metrics_that_there_are_and_replicas_are_its_own() -> None:
    found = rendered(EVERYTHING)
    scaler = found["HorizontalPodAutoscaler/trivec"]["spec"]
    targets = {
        one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"]
        for one in scaler["metrics"]
    }
    assert targets == {"trivec_queue_seconds": "1", "trivec_tokens_per_second": "5000000"}
    assert set(targets) <= shown_metrics()
    assert "replicas" not in found["Deployment/trivec"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "trivec"


def test_keda_asks_for_metrics_that_there_are_of_what_the_monitor_scrapes() -> None:
    found = rendered(KEDA)
    scaled = found["ScaledObject/trivec"]
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert scaled["spec"]["scaleTargetRef"] == {"name": "trivec"}
    triggers = scaled["spec"]["triggers"]
    queries = [one["metadata"]["query"] for one in triggers]
    assert set(re.findall(r"trivec_\w+", " ".join(queries))) <= shown_metrics()
    assert [one["metadata"]["threshold"] for one in triggers] == ["1", "500"]
    monitor = found["ServiceMonitor/trivec"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    for query in queries:
        [(namespace, service)] = re.findall(r'namespace="(.+)",service="(.+)"', query)
        assert namespace == "search"
        labels = found[f"Service/{service}"]["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "trivec", "key": "TRIVEC_API_KEY"}
    plain = found["Service/trivec"]["metadata"]["labels"]
    assert not monitor["spec"]["selector"]["matchLabels"].items() <= plain.items(), "scraped twice"


@CHOICES
def test_what_selects_the_servers_pods_selects_no_others(values: Mapping[str, Any]) -> None:
    found = rendered(values, name="blue")
    pods = {
        name: one["spec"]["template"]["metadata"]["labels"].items()
        for name, one in found.items()
        if one["kind"] in ("Deployment", "Job")
    }
    for one in found.values():
        spec = one["spec"]
        match one["kind"]:
            case "Service":
                selector = spec["selector"]
            case "Deployment" | "PodDisruptionBudget":
                selector = spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = spec["podSelector"]["matchLabels"]
            case _:
                continue
        chosen = [name for name, labels in pods.items() if selector.items() <= labels]
        assert chosen == ["Deployment/blue-trivec"], one["kind"]


def test_the_network_is_closed_but_for_what_is_named() -> None:
    def ports(rules: list[dict[str, Any]]) -> list[Any]:
        return [port["port"] for rule in rules for port in rule["ports"]]

    spec = rendered({})["NetworkPolicy/trivec"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert ports(spec["ingress"]) == ["http", "probes"]
    assert ports(spec["egress"]) == [53, 53, 5432]
    assert ports(rendered(SQLITE)["NetworkPolicy/trivec"]["spec"]["egress"]) == [53, 53]
    spec = rendered(EVERYTHING)["NetworkPolicy/trivec"]["spec"]
    assert ports(spec["egress"]) == [53, 53, 5432, 443, 4318]
    assert spec["ingress"][0]["from"] == EVERYTHING["networkPolicy"]["clients"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        pytest.param({"models": []}, "models", id="no-model"),
        pytest.param({"device": "gpu"}, "device", id="a-device-that-is-no-resource"),
        pytest.param({"autoscaling": {"kind": "vpa"}}, "kind", id="an-unknown-autoscaler"),
        pytest.param({"env": {"TRIVEC_PORT": 9000}}, "TRIVEC_PORT", id="a-number-that-is-no-text"),
        pytest.param({"replica": 3}, "replica", id="a-misspelt-value"),
        pytest.param({"drain": {"preStop": 0}}, "preStop", id="no-time-for-the-proxies"),
        pytest.param({"pull": ["bge-m3; rm -rf /"]}, "pull", id="a-model-that-is-no-id"),
        pytest.param({"database": {"enabled": False}}, "database.enabled", id="two-sqlite-files"),
        pytest.param(
            {"autoscaling": {"kind": "hpa", "replicasMax": 1}}, "replicasMax", id="max-below-min"
        ),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: Mapping[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmError, match=named):
        rendered(values)


def test_a_packaged_chart_needs_no_other_and_says_the_same(tmp_path: Path) -> None:
    archive = helm.package(CHART, destination=tmp_path)
    with helm.Chart.load(archive) as packaged, helm.Chart.load(CHART) as chart:
        assert packaged.render({}, name="trivec") == chart.render({}, name="trivec")
    assert "dependencies" not in yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))


def test_the_chart_has_the_version_of_the_package() -> None:
    from trivec import __version__

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__
