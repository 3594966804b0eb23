"""Pulling through the real huggingface_hub client from a hub on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.checkpoints.hub import COMMIT, Hub, serve_hub
from tests.checkpoints.tiny import write_tiny

from trivec.checkpoints import open_own
from trivec.checkpoints.catalogue import CatalogueEntry, Pin, entry_of
from trivec.checkpoints.hashes import Hashes
from trivec.checkpoints.hub import PINS_FILE, pull, pulled_folder
from trivec.core.errors import CheckpointRefused

WEIGHTS = "pytorch_model.bin"
BGE_M3 = entry_of("baai/bge-m3")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub's repository holds: a tiny model with heads, as torch files, and a stranger."""
    folder = write_tiny(tmp_path_factory.mktemp("hub") / "tiny-m3", torch_files=True)
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serve_hub(published, model_id="Org/tiny-m3") as served:
        yield served


@pytest.fixture
def unpinned() -> CatalogueEntry:
    return replace(
        BGE_M3, id="org/tiny-m3", hub_id="Org/tiny-m3", aliases=(), revision=None, pins={}
    )


@pytest.fixture
def pinned(unpinned: CatalogueEntry, published: Path, tmp_path: Path) -> CatalogueEntry:
    hashes = Hashes(tmp_path / "unused")
    names = [
        file.relative_to(published).as_posix()
        for file in published.rglob("*")
        if file.is_file() and file.name != "README.md"
    ]
    found = {name: hashes.of(published / name) for name in names}
    pins = {name: Pin(file.byte_count, file.sha256) for name, file in found.items()}
    return replace(unpinned, revision=COMMIT, pins=pins)


def test_a_pinned_model_is_pulled_whole_and_opens_verified(
    hub: Hub, pinned: CatalogueEntry, tmp_path: Path
) -> None:
    folder = pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    checkpoint = open_own(pinned, cache_dir=tmp_path)
    assert checkpoint is not None
    assert checkpoint.verified
    assert (checkpoint.folder, checkpoint.source) == (folder, "hub")
    assert checkpoint.heads is not None
    with checkpoint.weights() as weights:
        assert weights.take("embeddings.LayerNorm.weight").shape == (64,)
    assert all(f"/resolve/{COMMIT}/" in one.path for one in hub.downloads())


def test_only_the_files_a_model_is_made_of_are_fetched(
    hub: Hub, unpinned: CatalogueEntry, tmp_path: Path
) -> None:
    pull(unpinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert not any(one.path.endswith("README.md") for one in hub.asked)
    assert any(one.path.endswith("sparse_linear.pt") for one in hub.downloads())


def test_heads_are_not_fetched_for_a_model_that_has_none(
    hub: Hub, unpinned: CatalogueEntry, tmp_path: Path
) -> None:
    pull(replace(unpinned, outputs=("dense",)), cache_dir=tmp_path, endpoint=hub.endpoint)
    assert not any("linear" in one.path for one in hub.asked)


def test_the_hubs_token_is_not_sent_to_a_storage_host(
    hub: Hub, pinned: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.storage_host = "localhost"
    pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert open_own(pinned, cache_dir=tmp_path) is not None
    sent = {one.path.startswith("/storage/"): one.authorization for one in hub.asked}
    assert sent == {False: "Bearer hf_secret", True: None}


def test_a_file_that_is_not_the_models_is_refused_or_passed_over(
    hub: Hub, pinned: CatalogueEntry, tmp_path: Path
) -> None:
    folder = pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    (folder / "model.safetensors").write_bytes(b"weights that nobody vouched for")
    found = open_own(pinned, cache_dir=tmp_path)
    assert found is not None
    assert found.weight_files[0].path.name == WEIGHTS
    (folder / "config_sentence_transformers.json").write_text("{}")
    with pytest.raises(CheckpointRefused, match="is not among the model's known files"):
        open_own(pinned, cache_dir=tmp_path)


def test_a_second_pull_fetches_nothing(hub: Hub, pinned: CatalogueEntry, tmp_path: Path) -> None:
    pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    hub.asked.clear()
    pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert hub.downloads() == []


def test_a_pull_goes_on_where_it_stopped(
    hub: Hub,
    pinned: CatalogueEntry,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub dies half-way through the weights; that half is not sent again."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    whole = (published / WEIGHTS).read_bytes()
    hub.dies_after_bytes = len(whole) // 2
    with pytest.raises(CheckpointRefused):
        pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    hub.dies_after_bytes, hub.is_dead = None, False
    hub.asked.clear()
    folder = pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert (folder / WEIGHTS).read_bytes() == whole
    (resumed,) = [one for one in hub.downloads() if one.path.endswith(WEIGHTS)]
    assert len(whole) // 2 - 4096 <= resumed.first_byte <= len(whole) // 2


def test_a_file_with_another_hash_is_refused_and_thrown_away(
    hub: Hub, pinned: CatalogueEntry, tmp_path: Path
) -> None:
    pin = pinned.pins[WEIGHTS]
    other = replace(pinned, pins={**pinned.pins, WEIGHTS: Pin(pin.byte_count, "0" * 64)})
    with pytest.raises(CheckpointRefused, match=rf"{WEIGHTS}.*{pin.sha256}.*{'0' * 64}"):
        pull(other, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert not list(tmp_path.rglob(f"*{WEIGHTS}*"))


def test_a_file_of_another_size_is_refused_before_it_is_fetched(
    hub: Hub, pinned: CatalogueEntry, tmp_path: Path
) -> None:
    pin = pinned.pins[WEIGHTS]
    other = replace(pinned, pins={**pinned.pins, WEIGHTS: Pin(pin.byte_count + 1, pin.sha256)})
    with pytest.raises(CheckpointRefused, match=f"expected are {pin.byte_count + 1:,}"):
        pull(other, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert not any(one.path.endswith(WEIGHTS) for one in hub.downloads())


def test_the_first_pull_of_an_unpinned_model_pins_it(
    hub: Hub, unpinned: CatalogueEntry, tmp_path: Path
) -> None:
    folder = pull(unpinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    noted = json.loads((folder / PINS_FILE).read_text())
    assert noted["revision"] == COMMIT
    assert WEIGHTS in noted["files"]
    checkpoint = open_own(unpinned, cache_dir=tmp_path)
    assert checkpoint is not None
    assert not checkpoint.verified, "nobody but the hub has vouched for these files"


def test_a_pulled_file_that_changes_later_is_refused(
    hub: Hub, unpinned: CatalogueEntry, tmp_path: Path
) -> None:
    folder = pull(unpinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-2000] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointRefused, match=f"{WEIGHTS}: has sha256"):
        open_own(unpinned, cache_dir=tmp_path)


def test_an_unfinished_pull_is_not_opened(hub: Hub, pinned: CatalogueEntry, tmp_path: Path) -> None:
    folder = pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)
    (folder / "sparse_linear.pt").unlink()
    assert open_own(pinned, cache_dir=tmp_path) is None


def test_a_hub_without_the_model_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"does not give the files of BAAI/bge-m3.*=DIR"):
        pull(BGE_M3, cache_dir=tmp_path, endpoint=hub.endpoint)


def test_two_pulls_of_one_model_do_not_share_a_part_file(
    hub: Hub, pinned: CatalogueEntry, tmp_path: Path
) -> None:
    import fcntl

    folder = pulled_folder(pinned, tmp_path)
    folder.mkdir(parents=True)
    with (folder / ".pull.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointRefused, match="another pull of this model is running"):
            pull(pinned, cache_dir=tmp_path, endpoint=hub.endpoint)


PULL_BGE_M3 = """
import sys
from pathlib import Path
from trivec.checkpoints.catalogue import entry_of
from trivec.checkpoints.hub import pull
from trivec.core.errors import CheckpointRefused
try:
    pull(entry_of("baai/bge-m3"), cache_dir=Path(sys.argv[1]))
except CheckpointRefused as refusal:
    print(refusal)
"""


def _pull_in_a_process(cache_dir: Path, **variables: str) -> str:
    """What a fresh process says: the client reads its variables when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PULL_BGE_M3, str(cache_dir)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_offline_is_respected_and_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    said = _pull_in_a_process(tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.endpoint)
    assert said.count("\n") == 0
    assert "HF_HUB_OFFLINE is set" in said
    assert "--model baai/bge-m3=DIR" in said
    assert hub.asked == []


def test_the_endpoint_of_the_environment_is_asked(hub: Hub, tmp_path: Path) -> None:
    said = _pull_in_a_process(tmp_path, HF_ENDPOINT=hub.endpoint)
    assert "does not give the files of BAAI/bge-m3" in said
    assert hub.asked[0].path.startswith("/BAAI/bge-m3/resolve/5617a9f61b")


def test_a_hub_that_cannot_be_reached_is_one_line_with_a_way_out(hub: Hub, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port, where nothing listens
    said = _pull_in_a_process(tmp_path, HF_ENDPOINT=nobody)
    assert said.count("\n") == 0
    assert "could not be fetched" in said
    assert "--model baai/bge-m3=DIR" in said
