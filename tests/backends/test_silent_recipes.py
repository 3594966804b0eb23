"""A recipe in which this machine computes nothing is refused, and the next one is tried."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.backends.silent import silent

from trivec.backends.openvino import OpenVinoBackend, certifying
from trivec.backends.openvino.certifying import best_int8
from trivec.backends.openvino.recipe import INT8_ROWS, INT8_ROWS_BF16, Recipe, int8_ladder
from trivec.backends.openvino.session import Session
from trivec.backends.openvino.witness import Plan, compiled, open_session
from trivec.checkpoints.checkpoint import Checkpoint

Silence = Callable[[Callable[[Recipe], bool]], None]


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Silence:
    """Let nothing be computed, while certifying, in the recipes that are named."""

    def chosen(is_silent: Callable[[Recipe], bool]) -> None:
        def compiler(plan: Plan, slot_count: int) -> Session:
            return (silent if is_silent(plan.recipe) else compiled)(plan, slot_count)

        monkeypatch.setattr(certifying, "bf16_pays", lambda _: True)
        monkeypatch.setattr(certifying, "open_session", partial(open_session, compiler=compiler))

    return chosen


def test_the_next_recipe_is_tried(tiny_m3: Checkpoint, silence: Silence) -> None:
    silence(lambda recipe: recipe == INT8_ROWS_BF16)
    found = best_int8(tiny_m3, slot_count=1)
    assert found.computes
    assert found.certificate.refused[0] == INT8_ROWS_BF16.name


def test_of_recipes_that_fail_the_last_that_computes_is_the_one(
    tiny_m3: Checkpoint, silence: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 that was asked for by name is given though it failed, so it must be one that runs."""
    silence(lambda recipe: recipe.group_size is not None)
    monkeypatch.setattr("trivec.backends.openvino.certificate.COSINE_MIN", 2.0)  # nothing passes
    found = best_int8(tiny_m3, slot_count=1)
    assert (found.recipe, found.computes) == (INT8_ROWS, True)


def test_where_no_int8_computes_auto_is_fp32(
    tiny_m3: Checkpoint, silence: Silence, tmp_path: Path
) -> None:
    silence(lambda recipe: recipe in int8_ladder(bf16_pays=True))
    backend = OpenVinoBackend.load(tiny_m3, precision="auto", cores=1, cache_dir=tmp_path)
    assert backend.precision == "fp32"
    assert backend.certificate is not None
    assert "dense -1.0000 min" in backend.certificate.summary
