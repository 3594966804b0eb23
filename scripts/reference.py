"""Write the pages that are made from the code; a test compares them.

python scripts/reference.py
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from trivec import __version__
from trivec.api.app import all_operations
from trivec.api.openapi import openapi_document
from trivec.cli import COMMANDS, load_command

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WRITTEN = "<!-- Written by scripts/reference.py; do not edit. -->"
MARKUP = re.compile(r"\[/?(?:dim|bold)?\]|\\(?=\[)")  # Rich's, in help texts


@dataclass(frozen=True, slots=True)
class Option:
    """An option or argument of a command, as help shows it."""

    name: str
    help: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command that can be run."""

    name: str  # as typed, with `trivec`
    help: str
    options: tuple[Option, ...]


def commands() -> Iterator[Command]:
    """Every command in the order of `trivec --help`."""
    for name in COMMANDS:
        loaded = load_command(name)
        yield from _commands(f"trivec {name}", loaded)


def _commands(path: str, loaded: Any) -> Iterator[Command]:
    if inner := getattr(loaded, "commands", None):
        for name, one in inner.items():
            yield from _commands(f"{path} {name}", one)
        return
    options = tuple(_option(one) for one in loaded.params if not one.hidden)
    yield Command(path, _plain(loaded.help), options)


def _option(parameter: Any) -> Option:
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [parameter.metavar or parameter.name.upper()]
    elif not parameter.is_flag and names[0] != "--help":
        names[-1] += f" {parameter.metavar or parameter.name.upper()}"
    says = _plain(parameter.help)
    default = parameter.default
    if parameter.show_default and isinstance(default, (str, int)) and not isinstance(default, bool):
        says += f" [default: {default}]"
    if isinstance(parameter.envvar, str):
        says += f" [env: {parameter.envvar}]"
    return Option(", ".join(names), says + (" [required]" if parameter.required else ""))


def _plain(text: str | None) -> str:
    return " ".join(MARKUP.sub("", text or "").split())


def cli_page() -> str:
    """docs/reference/cli.md."""
    parts = [
        f"# Command line\n\n{WRITTEN}\n\n`trivec COMMAND --help` says the same in the terminal."
    ]
    for one in commands():
        rows = [f"| `{_cell(o.name)}` | {_cell(o.help)} |" for o in one.options]
        table = "\n".join(["| option | meaning |", "|---|---|", *rows]) if rows else ""
        says = one.help.replace("docs/configuration.md", "[Settings](../configuration.md)")
        parts.append(f"## {one.name}\n\n{says}\n\n{table}".rstrip())
    return "\n\n".join(parts) + "\n"


def man_page() -> str:
    """deploy/trivec.1, in roff: where a wheel is installed, `man trivec` finds it."""

    def roff(text: str) -> str:
        return re.sub(
            r"^(?=[.'])", r"\\&", text.replace("\\", r"\e").replace("-", r"\-"), flags=re.M
        )

    lines = [f'.TH TRIVEC 1 "" "trivec {__version__}" "User Commands"', ".SH NAME"]
    lines += [roff("trivec - self-hosted text embeddings behind the OpenAI API"), ".SH SYNOPSIS"]
    lines += [".B trivec", roff("COMMAND [OPTIONS]"), ".SH COMMANDS"]
    for one in commands():
        lines += [f".SS {roff(one.name)}", roff(one.help)]
        for option in one.options:
            lines += [".TP", f".B {roff(option.name)}", roff(option.help)]
    lines += [".SH EXIT STATUS", roff("0: done. 2: refused, and standard error says why.")]
    lines += [
        roff("serve: 70 where it cannot go on and is to be started again. embed: 3 where rows")
    ]
    lines += [roff("have no vector; 130 when it was stopped.")]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """docs/reference/api.md, from what `/openapi.json` serves."""
    document = json.loads(openapi_document(all_operations(True, metrics_open=False)))
    prefixes = ("/openai/v1/", "/v3/openai/")  # the same routes once more
    parts = [
        f"# The API, every route\n\n{WRITTEN}\n\nA server has the same as OpenAPI 3.1 at `/openapi.json`,"
        " and as a page to try at `/docs`. [The API in words](../api.md) says what the fields mean."
    ]
    paths = {
        path: item for path, item in document["paths"].items() if not path.startswith(prefixes)
    }
    openai = [path for path in paths if f"/openai{path}" in document["paths"]]
    admin = [path for path in paths if path.startswith("/admin/")]
    sections = {
        "OpenAI, under `/v1`, `/openai/v1` and `/v3/openai`": openai,
        "Administration": admin,
        "Probes and other APIs": [path for path in paths if path not in {*openai, *admin}],
    }
    for title, mine in sections.items():
        parts.append(f"## {title}")
        for path in mine:
            parts += [_route(method, path, one) for method, one in paths[path].items()]
    parts.append("## Types")
    schemas = document["components"]["schemas"]
    parts += [_type(name, schemas[name]) for name in sorted(schemas)]
    return "\n\n".join(parts) + "\n"


def _route(method: str, path: str, operation: Any) -> str:
    asked = operation.get("requestBody", {}).get("content", {}).values()
    takes = ", ".join(_kind(one["schema"]) for one in asked)
    answers = operation["responses"]["200"].get("content", {})
    gives = ", ".join(
        _kind(one["schema"]) if "schema" in one else f"`{name}`" for name, one in answers.items()
    )
    statuses = ", ".join(status for status in operation["responses"] if status != "200")
    facts = [f"takes {takes}"] * bool(takes) + [f"answers {gives}"] * bool(gives)
    facts += ["needs a key"] * bool(operation.get("security")) + [f"errors {statuses}"] * bool(
        statuses
    )
    told = "; ".join(facts)
    return (
        f"### {method.upper()} {path}\n\n{operation['summary']}.\n\n{told[:1].upper()}{told[1:]}."
    )


def _type(name: str, schema: Any) -> str:
    lines = [f"### {name}", *([_cell(schema["description"])] if "description" in schema else [])]
    if "properties" not in schema:
        return "\n\n".join([*lines, _kind(schema)])
    required = schema.get("required", ())
    rows = [
        f"| `{field}`{' (required)' if field in required else ''} | {_cell(_kind(one))} | "
        f"{_cell(one.get('description', ''))} |"
        for field, one in schema["properties"].items()
    ]
    return "\n\n".join([*lines, "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])])


def _kind(schema: Any) -> str:
    """A type in words: `integer 1 to 2048 or null`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(one)}`" for one in schema["enum"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"list of {', '.join(_kind(one) for one in schema['prefixItems'])}"
        least, most = schema.get("minItems"), schema.get("maxItems")
        return f"list of {_kind(schema.get('items', {}))}{_bounds(least, most)}"
    kind = schema.get("type", "any")
    least, most = schema.get("minimum"), schema.get("maximum")
    return f"{kind}{_bounds(least, most)}"


def _bounds(least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return ""
    return f" ({'' if least is None else f'{least:g} '}to {'' if most is None else f'{most:.15g}'})".replace(
        "to )", "or more)"
    )


def metrics_page() -> str:
    """docs/metrics.md with its table made anew."""
    from tests.telemetry.events import every_kind, every_load

    from trivec.telemetry import Metrics

    metrics = Metrics()
    metrics.watch(every_load)
    for event in every_kind():
        metrics.observe(event)
    rows = []
    for family in text_string_to_metric_families(metrics.page().decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = [label for label in family.samples[0].labels if label != "le"]
        shown = ", ".join(f"`{label}`" for label in labels) or "none"
        if name.startswith("trivec_"):
            rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |\n")
    page = (ROOT / "docs/metrics.md").read_text("utf-8")
    return re.sub(r"(?:^\| `trivec_\w+` \|.*\n)+", "".join(rows), page, count=1, flags=re.M)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


PAGES = {
    "docs/reference/api.md": api_page,
    "docs/reference/cli.md": cli_page,
    "deploy/trivec.1": man_page,
    "docs/metrics.md": metrics_page,
}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), "utf-8")
