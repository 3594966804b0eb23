"""One metrics page of several processes: every series labelled with the process that counted it.

A process that is started again begins at zero under its own label, as Prometheus expects of it.
"""

from collections.abc import Iterable, Mapping

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

PROCESS = "process"


def merged_pages(pages: Mapping[str, bytes]) -> bytes:
    """*pages* by process as one, in Prometheus's text format."""
    return generate_latest(_Merged(pages))


class _Merged:
    def __init__(self, pages: Mapping[str, bytes]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Family]:
        """Each family once, the samples of one process after another's."""
        merged: dict[str, Family] = {}
        for process, page in sorted(self._pages.items()):
            for family in text_string_to_metric_families(page.decode()):
                whole = merged.setdefault(
                    family.name, Family(family.name, family.documentation, family.type)
                )
                whole.samples += [
                    one._replace(labels={**one.labels, PROCESS: process}) for one in family.samples
                ]
        return merged.values()
