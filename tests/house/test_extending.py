"""The house is open: what is added in one file is served, and nothing in `src` is touched."""

from pathlib import Path

import numpy as np
import pytest
from tests.support import toy_model

from trivec.build import load_models, open_server_parts
from trivec.core.types import LongText, Output
from trivec.settings import load_settings


@pytest.mark.parametrize("precision", ["fp32", "int8"])
async def test_a_family_in_one_file_is_loaded_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    toy_model.register(monkeypatch)
    folder = toy_model.write_checkpoint(tmp_path / "toy")
    settings = load_settings(
        {"models": [f"toy={folder}"], "precision": precision, "data_dir": str(tmp_path)}, {}
    )
    parts = open_server_parts(settings)
    models = load_models(settings, parts, cores=1)
    models.workers.start()
    try:
        engine = models.embedders["toy"]
        sequences = await engine.tokenize(["w1 w2 w3", "w4", "w1 w2 w3"], long_text=LongText.REFUSE)
        vectors = (await engine.embed(sequences, Output.DENSE)).vectors.dense
    finally:
        await models.workers.stop(0)
    assert vectors.shape == (3, 48)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1], atol=0.01)
