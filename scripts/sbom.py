"""Write what the pinned closure of `make serve` is: requirements/sbom.json (CycloneDX 1.6), licences.md.

python scripts/sbom.py, in an environment that has it installed. Pins and hashes are those of
requirements/serve.txt, licences what each package's own metadata says; a test compares the pins.
"""

import json
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from trivec import __version__

FOLDER = Path(__file__).resolve().parents[1] / "requirements"
CLASSIFIERS = {  # by their last part, for packages whose metadata has no SPDX expression
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
LICENCES = """\
# Licences

Written by `scripts/sbom.py`; do not edit. The pinned closure of `make serve`, hash by hash in `sbom.json`.

| package | version | licence |
|---|---|---|
"""


def pins() -> list[tuple[str, str, tuple[str, ...]]]:
    """Name, version and the SHA-256 of each file, of every pin in order."""
    text = (FOLDER / "serve.txt").read_text("utf-8")
    found = re.findall(r"^([\w.-]+)==([^\s;]+)((?:.*\\\n)*.*)", text, re.M)
    return [
        (name, version, tuple(re.findall(r"sha256:(\w+)", rest))) for name, version, rest in found
    ]


def licence_of(name: str) -> str:
    """An SPDX expression."""
    metadata = distribution(name).metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    kinds = [one.rpartition(" :: ")[2] for one in metadata.get_all("Classifier") or ()]
    if known := [CLASSIFIERS[one] for one in kinds if one in CLASSIFIERS]:
        return " OR ".join(known)
    return str(metadata["License"])


def bill() -> dict[str, Any]:
    """The bill of materials."""
    components = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
            "licenses": [{"expression": licence_of(name)}],
            "hashes": [{"alg": "SHA-256", "content": one} for one in hashes],
        }
        for name, version, hashes in pins()
    ]
    product = {
        "type": "application",
        "bom-ref": f"pkg:pypi/trivec@{__version__}",
        "name": "trivec",
        "version": __version__,
        "licenses": [{"expression": "Apache-2.0"}],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": product},
        "components": components,
    }


def main() -> None:
    """Write both files."""
    made = bill()
    components = ",\n".join(
        json.dumps(one) for one in made["components"]
    )  # a line each, to compare
    text = json.dumps(made | {"components": []}).replace(
        '"components": []', '"components": [\n%s\n]'
    )
    (FOLDER / "sbom.json").write_text(text % components + "\n", "utf-8")
    rows = [
        f"| {one['name']} | {one['version']} | {one['licenses'][0]['expression']} |\n"
        for one in made["components"]
    ]
    (FOLDER / "licences.md").write_text(LICENCES + "".join(rows), "utf-8")


if __name__ == "__main__":
    main()
