"""Several processes' metrics as one page."""

from prometheus_client.parser import text_string_to_metric_families

from trivec.core.events import RowNotFinite
from trivec.telemetry import Metrics, merged_pages
from trivec.telemetry.table import ROWS_NOT_FINITE


def test_every_series_says_whose_it_is_and_every_family_stands_once() -> None:
    one, other = Metrics(), Metrics()
    other.observe(RowNotFinite("m", recovered=True))
    page = merged_pages({"api-1": one.page(), "engine": other.page()}).decode()
    families = list(text_string_to_metric_families(page))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["process"] for sample in samples} == {"api-1", "engine"}
    counted = {
        sample.labels["process"]: sample.value
        for sample in samples
        if sample.name == ROWS_NOT_FINITE.name and sample.value
    }
    assert counted == {"engine": 1}


def test_a_page_by_itself_keeps_its_numbers_and_types() -> None:
    page = Metrics().page()
    merged = merged_pages({"engine": page})
    before = {one.name: one for one in text_string_to_metric_families(page.decode())}
    after = {one.name: one for one in text_string_to_metric_families(merged.decode())}
    assert before.keys() == after.keys()
    for name, family in before.items():
        assert (after[name].type, after[name].documentation) == (family.type, family.documentation)
        assert [one.value for one in after[name].samples] == [one.value for one in family.samples]
