"""Write docs/configuration.md from the settings themselves; a test compares the two.

python scripts/configuration.py > docs/configuration.md
"""

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trivec.settings import Settings, variable_name

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/configuration.py; do not edit. -->

Flags win over the environment, the environment over the file that `--config FILE` (or
`TRIVEC_CONFIG`) names, the file over the defaults here. The file is TOML:

```toml
models = ["baai/bge-m3", "all-minilm-l6-v2"]
port = 8080

[http]
body_bytes_max = 4194304
```

In the environment that is `TRIVEC_MODEL=baai/bge-m3,all-minilm-l6-v2`, `TRIVEC_PORT=8080` and
`TRIVEC_HTTP__BODY_BYTES_MAX=4194304`. A key that is not known stops the start and is named; so
does a value that cannot be. A variable `TRIVEC_...` that is not known is a warning. The settings
at the top that have a flag are listed by `trivec serve --help`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_tables(Settings)])


def _tables(section: type[BaseModel], path: str = "") -> Iterator[str]:
    plain = {name: one for name, one in section.model_fields.items() if not _section_of(one)}
    if path:
        yield f"## [{path}]\n\n{section.__doc__}\n"
    else:
        yield "## At the top\n"
    yield "| setting | default | environment | what it is |\n|---|---|---|---|"
    for name, field in plain.items():
        here = f"{path}.{name}" if path else name
        variable = "TRIVEC_MODEL" if here == "models" else variable_name(here)
        yield f"| `{name}` | {_default(field)} | `{variable}` | {_meaning(field)} |"
    yield ""
    for name, field in section.model_fields.items():
        if inner := _section_of(field):
            yield from _tables(inner, f"{path}.{name}" if path else name)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _default(field: FieldInfo) -> str:
    if field.default is None or field.default == ():
        return "none"
    if isinstance(field.default, tuple):
        return ", ".join(f"`{one}`" for one in field.default)
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _meaning(field: FieldInfo) -> str:
    choices = get_args(field.annotation)
    if len(choices) == 2 and choices[1] is type(None):
        choices = get_args(choices[0])
    if not all(isinstance(one, str) for one in choices):
        choices = ()
    ending = f" One of {', '.join(f'`{one}`' for one in choices)}." if choices else ""
    return f"{field.description}{ending}"


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
