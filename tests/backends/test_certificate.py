"""int8 is certified: compared on probes, refused where it would be seen, kept and checked on disk."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.backends.batches import ALL, batch_of
from tests.backends.conftest import OpenTiny, TensorsIn, random_ids
from tests.checkpoints.tiny import write_tiny

from trivec.backends.openvino import OpenVinoBackend, cache, check_cache
from trivec.backends.openvino.cache import CacheWriter, cache_folder, load
from trivec.backends.openvino.calibrate import (
    LENGTHS_MADE,
    Calibration,
    Certificate,
    CosineStatistics,
    QuantisedModel,
    best_int8,
    compare,
    make_probes,
    read_sentences,
)
from trivec.backends.openvino.quantise import (
    INT8_CONV,
    INT8_CONV_W7,
    INT8_GROUPS_32,
    INT8_GROUPS_128,
    INT8_ROWS,
    INT8_ROWS_BF16,
    INT8_ROWS_W7,
    INT8_SCHEMES,
    QuantScheme,
)
from trivec.backends.openvino.session import Session
from trivec.backends.openvino.trial import ProductTrial
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.hashes import Hashes
from trivec.core.errors import SettingInvalid
from trivec.core.types import Sequences, SparseVector, Vectors
from trivec.models.pooling import Pooling

EXACT = ProductTrial(speed=2.0, exact_bits=8, weights_only=False)
SLOW = ProductTrial(speed=0.8, exact_bits=8, weights_only=False)
WITH_VNNI = {INT8_ROWS: EXACT, INT8_CONV: SLOW, INT8_GROUPS_128: EXACT}
WITHOUT = {  # AVX2, as far as is known
    INT8_ROWS: ProductTrial(speed=0.8, exact_bits=7, weights_only=False),
    INT8_CONV: ProductTrial(speed=1.5, exact_bits=7, weights_only=False),
    INT8_GROUPS_128: ProductTrial(speed=0.9, exact_bits=8, weights_only=True),
}
Trials = dict[QuantScheme, ProductTrial]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trials], None]:
    """Let the trial of the int8 products have ended so, whatever this machine is."""

    def chosen(trials: Trials) -> None:
        monkeypatch.setattr("trivec.backends.openvino.calibrate.try_products", lambda *_: trials)

    return chosen


@pytest.fixture(params=[True, False], ids=["bf16 pays", "bf16 does not pay"])
def candidates(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[[Trials], None],
) -> tuple[QuantScheme, ...]:
    """The int8 schemes of a machine with VNNI whose trial of bf16 ended so, or so."""
    pays: bool = request.param
    machine(WITH_VNNI)
    monkeypatch.setattr("trivec.backends.openvino.calibrate.bf16_pays", lambda _: pays)
    schemes = (INT8_ROWS_BF16, INT8_ROWS, INT8_GROUPS_128, INT8_GROUPS_32)
    return schemes if pays else schemes[1:]


def vectors_of(dense: np.ndarray) -> Vectors:
    return Vectors.of(dense.astype(np.float32), (None,) * len(dense), (None,) * len(dense))


def test_probes_cover_twenty_scripts_and_lengths_from_3_to_512(tiny_m3: Checkpoint) -> None:
    scripts = {name.split(",")[0] for name in read_sentences()} - {"Code", "Emoji"}
    assert len(scripts) >= 20
    _, evaluation = make_probes(tiny_m3)
    assert set(LENGTHS_MADE) <= set(evaluation.lengths().tolist())
    assert (min(LENGTHS_MADE), max(LENGTHS_MADE)) == (3, 512)


def test_no_sentence_is_used_both_to_calibrate_and_to_evaluate() -> None:
    pairs = read_sentences().values()
    assert not {first for first, _ in pairs} & {second for _, second in pairs}


@pytest.mark.parametrize(
    ("minimum", "mean", "passes"),
    [
        pytest.param(0.99, 0.998, True, id="at-both-thresholds"),
        pytest.param(0.9899, 0.999, False, id="one-bad-text"),
        pytest.param(0.995, 0.9979, False, id="all-a-little-off"),
    ],
)
def test_the_thresholds(minimum: float, mean: float, passes: bool) -> None:
    assert CosineStatistics(minimum, mean).passes is passes


def test_a_bad_head_alone_fails_the_certificate() -> None:
    good, bad = CosineStatistics(0.999, 0.999), CosineStatistics(0.97, 0.99)
    cosines = {"dense": good, "sparse": good, "multi": bad}
    certificate = Certificate("int8-rows", cosines, 10, 20, ())
    assert not certificate.passes
    assert "FAILS" in certificate.summary


def test_cosines_are_of_each_sequence_and_of_nan_minus_one() -> None:
    exact = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    other = np.array([[1.0, 0.0], [0.0, 5.0], [np.nan, 1.0]])
    found = compare(vectors_of(exact), vectors_of(other))["dense"]
    assert found.minimum == -1.0
    assert found.mean == pytest.approx(1 / 3)


def test_sparse_cosine_counts_ids_that_only_one_side_has() -> None:
    a = SparseVector(np.array([5, 9], np.int32), np.array([3.0, 4.0], np.float32))
    b = SparseVector(np.array([5, 7], np.int32), np.array([3.0, 4.0], np.float32))
    one = np.ones((1, 2), np.float32)
    found = compare(Vectors.of(one, (a,), (None,)), Vectors.of(one, (b,), (None,)))
    assert found["sparse"].minimum == pytest.approx(9 / 25)


def spoiled(
    folder: Path, spoil: Callable[[dict[str, np.ndarray]], None], *, layers: int = 6
) -> Checkpoint:
    """A tiny model whose weights *spoil* has changed."""
    write_tiny(folder / "model", hidden=128, layers=layers, heads=False, position_count=700)
    file = next((folder / "model").glob("*.safetensors"))
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    return open_checkpoint(str(folder / "model"), cache_dir=folder / "cache")


def outliers_that_cancel(tensors: dict[str, np.ndarray], *, layer: str = "layer.") -> None:
    """Channels 0 and 1, always equal, are read with weights thousands of times the others, + and -.

    In fp32 the two cancel; in int8 nothing is left of the rest, and no factor helps.
    """
    draw = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if "embeddings" in name and tensor.ndim == 2:
            tensor[:, 1] = tensor[:, 0]
        elif "LayerNorm" in name or "output.dense" in name:
            tensor[1] = tensor[0]
        elif layer in name and name.endswith(
            ("query.weight", "key.weight", "intermediate.dense.weight")
        ):
            size = draw.uniform(2e3, 1e4, len(tensor)).astype(np.float32) * np.abs(tensor).mean()
            tensor[:, 0] += size
            tensor[:, 1] -= size


def test_extreme_outliers_are_refused_int8(
    tmp_path: Path, candidates: tuple[QuantScheme, ...]
) -> None:
    checkpoint = spoiled(tmp_path, outliers_that_cancel)
    backend = OpenVinoBackend.load(checkpoint, precision="auto", cores=1, cache_dir=tmp_path)
    assert backend.certificate is not None
    assert not backend.certificate.passes
    assert backend.precision == "fp32"
    scheme, refused = backend.certificate.scheme, backend.certificate.refused
    tried = tuple(one.name for one in candidates)[
        : len(refused)
    ]  # all, where the grouped schemes run
    assert refused[: len(tried)] == tried
    assert scheme not in refused


def test_one_sensitive_layer_in_fp32_can_be_enough(
    tmp_path: Path, candidates: tuple[QuantScheme, ...], tensors_in: TensorsIn
) -> None:
    tensors_in(INT8_GROUPS_32)  # or the test is skipped
    one_layer = partial(outliers_that_cancel, layer="layer.1.")
    checkpoint = spoiled(tmp_path, one_layer, layers=3)
    found = best_int8(checkpoint, slot_count=1)
    assert found.certificate.passes
    assert found.scheme.exact_layers == {1}
    assert found.certificate.refused == tuple(one.name for one in candidates)


def test_a_token_of_zeros_does_not_hide_which_layer_is_sensitive(
    open_tiny: OpenTiny, tmp_path: Path, tensors_in: TensorsIn
) -> None:
    """Gemma's padding token may be one, and it fills up a micro-batch."""
    tensors_in(INT8_GROUPS_32)  # or the test is skipped
    original = open_tiny("gemma3_text", Pooling.MEAN)
    folder = Path(shutil.copytree(original.folder, tmp_path / "model"))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["embed_tokens.weight"][0] = 0
    save_file(tensors, file)
    checkpoint = open_checkpoint(str(folder), cache_dir=tmp_path / "cache")
    *_, last = Calibration(checkpoint, slot_count=1).candidates()
    assert len(last.exact_layers) == 1


def test_int8_asked_for_by_name_is_given_and_says_that_it_failed(tmp_path: Path) -> None:
    checkpoint = spoiled(tmp_path, outliers_that_cancel)
    backend = OpenVinoBackend.load(checkpoint, precision="int8", cores=1, cache_dir=tmp_path)
    assert backend.precision == "int8"
    assert backend.certificate is not None
    assert "FAILS" in backend.certificate.summary


def certified(monkeypatch: pytest.MonkeyPatch, *, passing: set[QuantScheme]) -> None:
    """Let each scheme's certificate say whether it is among *passing*, whatever this CPU makes of it.

    What int8 keeps of a model depends on the CPU's instructions; which scheme is taken must not.
    """

    def attempt(
        calibration: Calibration, scheme: QuantScheme, *, refused: tuple[str, ...]
    ) -> QuantisedModel:
        cosines = {"dense": CosineStatistics(*(0.999, 0.999) if scheme in passing else (0.5, 0.5))}
        product = calibration._product(scheme)
        certificate = Certificate(scheme.name, cosines, 10, 20, refused, product=product)
        states = np.zeros((1, 1), np.float32)
        return QuantisedModel(scheme, certificate, tensors={}, references={scheme.name: states})

    monkeypatch.setattr(Calibration, "attempt", attempt)


def test_more_slots_than_probes_are_no_obstacle(
    tiny_m3: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = tuple(Sequences.pack(random_ids([9, 5], seed=seed)) for seed in range(2))
    monkeypatch.setattr("trivec.backends.openvino.calibrate.make_probes", lambda _: two)
    made = Calibration(tiny_m3, slot_count=4).attempt(INT8_ROWS)
    assert made.scheme == INT8_ROWS


def test_the_fastest_scheme_is_tried_first(
    tiny_m3: Checkpoint, candidates: tuple[QuantScheme, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    certified(monkeypatch, passing=set(candidates))
    found = best_int8(tiny_m3, slot_count=1)
    assert found.scheme == candidates[0]
    assert found.scheme in (INT8_ROWS, INT8_ROWS_BF16)
    assert not found.certificate.refused


def test_the_first_scheme_that_passes_is_taken(
    tiny_m3: Checkpoint, candidates: tuple[QuantScheme, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    certified(monkeypatch, passing={INT8_GROUPS_32})
    found = best_int8(tiny_m3, slot_count=1)
    assert found.scheme == INT8_GROUPS_32
    assert found.certificate.refused == tuple(one.name for one in candidates[:-1])
    assert found.certificate.refused[-2:] == (INT8_ROWS.name, INT8_GROUPS_128.name)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        pytest.param(WITHOUT, INT8_CONV_W7, id="a-convolution-is-faster"),
        pytest.param(
            WITHOUT | {INT8_ROWS: replace(WITHOUT[INT8_ROWS], speed=1.4)},
            INT8_ROWS_W7,
            id="a-convolution-hardly-is",
        ),
        pytest.param(
            WITHOUT | {INT8_CONV: replace(WITHOUT[INT8_CONV], exact_bits=0)},
            INT8_ROWS_W7,
            id="a-convolution-is-never-exact",
        ),
        pytest.param(
            WITHOUT | {INT8_CONV: replace(WITHOUT[INT8_CONV], exact_bits=8)},
            INT8_CONV,
            id="it-is-exact-with-8-bits",
        ),
    ],
)
def test_the_fastest_product_that_is_exact_is_tried_first(
    tiny_m3: Checkpoint,
    machine: Callable[[Trials], None],
    trials: Trials,
    expected: QuantScheme,
) -> None:
    machine(trials)
    assert next(iter(Calibration(tiny_m3, slot_count=1).candidates())) == expected


def test_schemes_that_quantise_weights_only_come_last_and_auto_takes_none(
    tiny_m3: Checkpoint,
    machine: Callable[[Trials], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    machine(WITHOUT)
    monkeypatch.setattr("trivec.backends.openvino.calibrate.COSINE_MEAN", 2.0)  # nothing passes
    *others, last = Calibration(tiny_m3, slot_count=1).candidates()
    assert last == INT8_GROUPS_128
    assert [one.group_size for one in others] == [None, None]
    assert others[1].exact_layers
    monkeypatch.undo()
    machine(WITHOUT)
    certified(monkeypatch, passing={INT8_GROUPS_128})
    best = best_int8(tiny_m3, slot_count=1)
    assert best.scheme == INT8_GROUPS_128
    assert best.certificate.passes
    assert not best.certificate.is_faster
    assert "for memory, not for speed" in best.certificate.summary


def test_int8_that_is_slower_than_fp32_is_only_given_when_asked_for(
    tiny_m3: Checkpoint, machine: Callable[[Trials], None], tmp_path: Path
) -> None:
    machine(dict.fromkeys(WITH_VNNI, replace(SLOW, exact_bits=7)))
    load = partial(OpenVinoBackend.load, tiny_m3, cores=1, cache_dir=tmp_path)
    backend = load(precision="auto")
    assert backend.certificate is not None
    assert backend.certificate.passes
    assert "0.80 times as fast" in backend.certificate.summary
    assert backend.precision == "fp32"
    assert load(precision="int8").recipe == backend.certificate.scheme


def test_a_product_that_saturates_is_never_certified(
    tiny_m3: Checkpoint, machine: Callable[[Trials], None], tmp_path: Path
) -> None:
    """Even where the probes' vectors are near enough: other texts' need not be."""
    machine(WITHOUT)
    for name in ("int8-rows", "int8-conv"):
        with pytest.raises(SettingInvalid, match=f"{name} FAILS .* SATURATE"):
            OpenVinoBackend.load(tiny_m3, precision=name, cores=1, cache_dir=tmp_path)


def test_a_precision_for_other_devices_is_refused_by_name(
    tiny_m3: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(SettingInvalid, match="bf16"):
        OpenVinoBackend.load(tiny_m3, precision="bf16", cores=1, cache_dir=tmp_path)


def kept(checkpoint: Checkpoint, cache_dir: Path) -> QuantisedModel | None:
    return load(cache_folder(checkpoint, precision="int8", cache_dir=cache_dir))


def test_the_second_start_reads_what_the_first_one_wrote(
    tiny_m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(random_ids([5, 80]), ALL)
    first = OpenVinoBackend.load(tiny_m3, precision="auto", cores=1, cache_dir=tmp_path)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("quantised again")

    monkeypatch.setattr("trivec.backends.openvino.backend.best_int8", forbidden)
    second = OpenVinoBackend.load(tiny_m3, precision="auto", cores=1, cache_dir=tmp_path)
    assert second.certificate == first.certificate
    assert second.run(batch, slot=0).dense.tobytes() == first.run(batch, slot=0).dense.tobytes()


def test_the_session_that_was_judged_is_the_one_that_serves(
    tiny_m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Session] = []
    vectors = Calibration._vectors

    def seen(self: Calibration, session: Session) -> Vectors:
        judged.append(session)
        return vectors(self, session)

    for bar in ("COSINE_MIN", "COSINE_MEAN"):  # what int8 keeps is up to the CPU
        monkeypatch.setattr(f"trivec.backends.openvino.calibrate.{bar}", -1.0)
    monkeypatch.setattr(Calibration, "_vectors", seen)
    monkeypatch.delattr("trivec.backends.openvino.backend.open_session")  # nothing else is compiled
    backend = OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path)
    assert backend._session in judged


def test_the_second_start_does_not_hash_what_the_first_one_wrote(
    tiny_m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of BGE-M3 that would be 0.9 GB."""
    OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path).close()
    monkeypatch.setattr("trivec.checkpoints.hashes.hashlib.file_digest", None)
    assert kept(tiny_m3, tmp_path) is not None


def test_a_bit_that_rots_in_silence_is_found_by_reading_whole(
    tiny_m3: Checkpoint, tmp_path: Path
) -> None:
    """The remembered hash is trusted while the file's times stay as they are."""
    OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path).close()
    folder = cache_folder(tiny_m3, precision="int8", cache_dir=tmp_path)
    assert check_cache(tmp_path) == {folder: None}
    file = folder / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    described = folder / "quantised.json"
    Hashes(folder).remember(file, json.loads(described.read_text())["sha256"])
    assert load(folder) is not None, "its stamp is the one that was remembered"
    assert "another" in (check_cache(tmp_path)[folder] or "")


@pytest.mark.parametrize(
    "damage", ["flipped bit", "cut short", "no certificate", "torn json", "a list"]
)
def test_a_damaged_cache_is_made_again(tiny_m3: Checkpoint, tmp_path: Path, damage: str) -> None:
    OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path).close()
    folder = cache_folder(tiny_m3, precision="int8", cache_dir=tmp_path)
    tensors, described = folder / "tensors.safetensors", folder / "quantised.json"
    content = bytearray(tensors.read_bytes())
    match damage:
        case "flipped bit":
            content[-1] ^= 1
            tensors.write_bytes(content)
        case "cut short":
            tensors.write_bytes(content[:-5])
        case "no certificate":
            described.unlink()
        case "a list":
            described.write_text("[]")
        case _:
            described.write_text(described.read_text()[:-20])
    assert load(folder) is None
    OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path).close()
    assert kept(tiny_m3, tmp_path) is not None


def test_a_certificate_never_meets_tensors_of_another_process(
    tiny_m3: Checkpoint, tmp_path: Path
) -> None:
    found = best_int8(tiny_m3, slot_count=1)
    mine, theirs = CacheWriter(tmp_path), CacheWriter(tmp_path)
    mine.keep(found.tensors)
    theirs.keep({name: np.zeros_like(tensor) for name, tensor in found.tensors.items()})
    mine.save(found)
    assert load(tmp_path) is None
    mine.keep(found.tensors)
    assert load(tmp_path) is not None


def test_a_cache_folder_that_cannot_be_written_is_named(
    tiny_m3: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "openvino").write_text("a file where a folder should be")
    with pytest.raises(SettingInvalid, match="cannot be written to"):
        OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path)


def test_other_weights_never_meet_this_cache(tiny_m3: Checkpoint, tmp_path: Path) -> None:
    other = replace(tiny_m3, digest="0" * 64)
    assert cache_folder(tiny_m3, precision="int8", cache_dir=tmp_path) != cache_folder(
        other, precision="int8", cache_dir=tmp_path
    )


def test_nothing_half_written_is_left_behind(tiny_m3: Checkpoint, tmp_path: Path) -> None:
    OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path).close()
    folder = cache_folder(tiny_m3, precision="int8", cache_dir=tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {"quantised.json", "tensors.safetensors"} < names
    assert len(names) == 3  # and the remembered hash
    assert not any(name.startswith(".") for name in names)
    shutil.rmtree(folder)


def test_what_a_killed_calibration_left_is_gone_after_the_next_start(
    tiny_m3: Checkpoint, tmp_path: Path
) -> None:
    folder = cache_folder(tiny_m3, precision="int8", cache_dir=tmp_path)
    folder.mkdir(parents=True)
    (folder / "tensors.safetensors").write_bytes(b"whole, and never judged")
    left = folder / ".tensors.safetensors.1234.part"
    for _ in range(2):  # as much with nothing kept as with something
        left.write_bytes(b"half")
        OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path).close()
        assert not left.exists()
        assert kept(tiny_m3, tmp_path) is not None


def test_what_older_editions_kept_is_never_read(
    tiny_m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another format is another folder, and the files had another name before the fourth."""
    older = tmp_path / "openvino" / "0123456789abcdef"
    older.mkdir(parents=True)
    (older / "prepared.json").write_text("{}")
    assert check_cache(tmp_path) == {}
    folder = cache_folder(tiny_m3, precision="int8", cache_dir=tmp_path)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT - 1)
    assert cache_folder(tiny_m3, precision="int8", cache_dir=tmp_path) != folder


@pytest.mark.parametrize(
    "scheme",
    [*INT8_SCHEMES, *(replace(one, exact_layers=frozenset({0, 11})) for one in INT8_SCHEMES)],
    ids=lambda scheme: scheme.name,
)
def test_a_scheme_is_found_by_its_exact_name(scheme: QuantScheme) -> None:
    assert QuantScheme.of_name(scheme.name) == scheme


@pytest.mark.parametrize(
    "name", ["int8-row", "int8-groups", "int8-rows-exact-", "int8-rows-exact-2-1", "fp32-exact-0"]
)
def test_an_unknown_scheme_is_refused_and_the_known_are_named(
    name: str, tiny_m3: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(SettingInvalid) as refused:
        OpenVinoBackend.load(tiny_m3, precision=name, cores=1, cache_dir=tmp_path)
    assert all(word in str(refused.value) for word in (name, *(one.name for one in INT8_SCHEMES)))


def test_a_pinned_scheme_is_run_and_kept_apart_from_the_automatic_choice(
    tiny_m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Calibration.attempt

    def passing(
        self: Calibration, scheme: QuantScheme, *, refused: tuple[str, ...] = ()
    ) -> QuantisedModel:
        tried = attempt(self, scheme, refused=refused)  # what it finds is up to the CPU
        cosines = dict.fromkeys(tried.certificate.cosines, CosineStatistics(0.999, 0.999))
        return replace(tried, certificate=replace(tried.certificate, cosines=cosines))

    monkeypatch.setattr(Calibration, "attempt", passing)
    pin = partial(OpenVinoBackend.load, tiny_m3, cores=1, cache_dir=tmp_path)
    name = INT8_ROWS.name
    assert pin(precision=name).recipe == name
    assert kept(tiny_m3, tmp_path) is None
    monkeypatch.delattr(Calibration, "attempt")
    again = pin(precision=name)
    assert (again.recipe, again.precision) == (name, "int8")
    assert OpenVinoBackend.load(tiny_m3, precision="fp32", cores=1, cache_dir=tmp_path).recipe == (
        "fp32"
    )


def test_a_pinned_scheme_that_fails_its_certificate_is_refused_with_its_figures(
    tmp_path: Path,
) -> None:
    checkpoint = spoiled(tmp_path, outliers_that_cancel)
    with pytest.raises(SettingInvalid, match=r"int8-rows FAILS .* min .* mean.* needs 0\.99 min"):
        OpenVinoBackend.load(checkpoint, precision="int8-rows", cores=1, cache_dir=tmp_path)
    assert list(tmp_path.glob("openvino/*")) == []


def test_a_pinned_scheme_that_cannot_run_here_is_refused(
    tiny_m3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivec.backends.openvino.backend.has_bf16", lambda: False)
    for name, reason in (("int8-rows-bf16", "bf16 products"), ("int8-rows-exact-99", "layer 99")):
        with pytest.raises(SettingInvalid, match=reason):
            OpenVinoBackend.load(tiny_m3, precision=name, cores=1, cache_dir=tmp_path)
