"""What `deploy/` holds fits what the server reads."""

import json
import re
from pathlib import Path

import pytest
import yaml

from trivec.settings import load_settings, setting_paths, variable_name

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ["Dockerfile", "Dockerfile.cuda"]


def test_the_sample_settings_load_without_a_warning() -> None:
    warned: list[str] = []
    config = str(ROOT / "deploy" / "trivec.toml")
    assert load_settings({"config": config}, {}, warn=warned.append).models == ("all-minilm-l6-v2",)
    assert not warned


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_a_user_by_number(name: str) -> None:
    users = re.findall(r"^USER (.+)$", (ROOT / "deploy" / name).read_text("utf-8"), re.M)
    assert users == ["10001:10001"]


def test_the_images_are_built_of_nothing_but_what_they_copy() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    text = " ".join((ROOT / "deploy" / name).read_text("utf-8") for name in IMAGES)
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    assert ignored[0] == "*"
    wanted = {f"!{name}" for line in copied for name in line.split()}
    assert wanted == {name for name in ignored if name.startswith("!")}
    assert [name for name in wanted if not (ROOT / name[1:]).exists()] == []


@pytest.mark.parametrize("name", IMAGES)
def test_the_variables_of_an_image_are_settings(name: str) -> None:
    named = set(re.findall(r"\bTRIVEC_[A-Z_]+(?==)", (ROOT / "deploy" / name).read_text("utf-8")))
    assert named <= {variable_name(path) for path in setting_paths()}


def test_the_unit_reads_its_secrets_from_a_file() -> None:
    assert "\nEnvironmentFile=-/etc/trivec/trivec.env\n" in (
        ROOT / "deploy/trivec.service"
    ).read_text("utf-8")


def test_the_image_has_the_driver_of_the_postgres_that_its_files_put_behind_it() -> None:
    pinned = (ROOT / "requirements/serve.txt").read_text("utf-8")
    assert re.findall(r"^psycopg(?:-binary)?(?===)", pinned, re.M) == ["psycopg", "psycopg-binary"]


def test_the_chart_names_variables_that_the_settings_know() -> None:
    """What can be checked without Helm; `tests/clients/test_helm.py` renders the chart."""
    templates = (ROOT / "deploy/helm/trivec/templates").glob("*.*")
    text = " ".join(file.read_text("utf-8") for file in templates)
    named = set(re.findall(r"\bTRIVEC_[A-Z_]+", text)) - {"TRIVEC_PORT"}
    known = {variable_name(path) for path in setting_paths()}
    assert named
    assert named <= known


def test_the_charts_schema_knows_every_value_and_each_value_fits_it() -> None:
    folder = ROOT / "deploy/helm/trivec"
    schema = json.loads((folder / "values.schema.json").read_text("utf-8"))
    values = yaml.safe_load((folder / "values.yaml").read_text("utf-8"))
    assert set(schema["properties"]) - {"global"} == set(values)
    for name, value in values.items():
        fields = schema["properties"][name].get("properties")
        if fields is not None and name != "resources":
            assert set(fields) == set(value), name


def test_the_compose_file_gives_variables_that_the_settings_know() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text("utf-8"))["services"]
    assert set(services["trivec"]["depends_on"]) < set(services)
    build = services["trivec"]["build"]
    assert (ROOT / "deploy" / build["context"] / build["dockerfile"]).is_file()
    known = {variable_name(path) for path in setting_paths()}
    assert set(services["trivec"]["environment"]) <= known


def test_the_files_that_compose_mounts_are_there_and_its_board_and_rules_are_ours() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text("utf-8"))
    mounts = [one for service in compose["services"].values() for one in service["volumes"]]
    files = [one.split(":")[0] for one in mounts if one.startswith("./")]
    assert {"./alerts.yml", "./grafana-dashboard.json"} <= set(files)
    assert [name for name in files if not (ROOT / "deploy" / name).is_file()] == []
    volumes = {one.split(":")[0] for one in mounts if not one.startswith("./")}
    assert volumes == set(compose["volumes"])
