"""A compiled model is used only after its slots stood up to the stored hidden states of fp32."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.backends.conftest import OpenTiny, TensorsIn

from trivec.backends.openvino import OpenVinoBackend, session
from trivec.backends.openvino.calibrate import Calibration, best_int8
from trivec.backends.openvino.quantise import (
    FP32,
    INT8_CONV,
    INT8_GROUPS_32,
    INT8_GROUPS_128,
    INT8_ROWS,
    INT8_ROWS_BF16,
    INT8_SCHEMES,
    QuantScheme,
    Tensors,
)
from trivec.backends.openvino.session import (
    COMPILES_MAX,
    Session,
    WrongOutputShape,
    open_session,
    self_test_ids,
)
from trivec.backends.openvino.trial import ProductTrial
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import StartError
from trivec.core.types import Float32Array, Int32Array
from trivec.models.pooling import Pooling

ROLLED = ("attention.self.query.weight", "output.dense.weight")


class Silent(Session):
    """Every result is empty and has lost its shape, as with int8 that this CPU cannot run."""

    def hidden(self, token_ids: Int32Array, *, slot: int, copies: int = 1) -> Float32Array:
        return np.empty(0, np.float32)


class LastSlotDiffers(Session):
    def hidden(self, token_ids: Int32Array, *, slot: int, copies: int = 1) -> Float32Array:
        found = super().hidden(token_ids, slot=slot, copies=copies)
        return found if slot == 0 else np.nextafter(found, np.float32(9))


class LastSlotDiffersOfMany(Session):
    """As if weights were wrong only where they are packed for many rows."""

    def hidden(self, token_ids: Int32Array, *, slot: int, copies: int = 1) -> Float32Array:
        found = super().hidden(token_ids, slot=slot, copies=copies)
        return found if slot == 0 or copies == 1 else np.nextafter(found, np.float32(9))


class WrongOfMany(Session):
    """On every slot alike."""

    def hidden(self, token_ids: Int32Array, *, slot: int, copies: int = 1) -> Float32Array:
        found = super().hidden(token_ids, slot=slot, copies=copies)
        return found if copies == 1 else np.roll(found, 1, axis=1)


def wrong(
    checkpoint: Checkpoint, tensors: Tensors, scheme: QuantScheme, *, slot_count: int, **_: object
) -> Session:
    """As if the plugin had given layers the weights of others."""
    rolled = {
        name: np.roll(tensor, 1, axis=0) if name.endswith(ROLLED) else tensor
        for name, tensor in tensors.items()
    }
    return Session(checkpoint, rolled, scheme, slot_count=slot_count)


Make = Callable[..., Session]
Compile = Callable[..., list[Make]]
ReferenceOf = Callable[[QuantScheme], Float32Array]


@pytest.fixture
def compile_as(monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Let sessions be made by each of some functions in turn, the last one from then on.

    What is returned lists the calls.
    """

    def chosen(*makers: Make) -> list[Make]:
        calls: list[Make] = []

        def make(*args: object, **named: object) -> Session:
            calls.append(makers[min(len(calls), len(makers) - 1)])
            return calls[-1](*args, **named)

        monkeypatch.setattr(session, "Session", make)
        return calls

    return chosen


@pytest.fixture(scope="module")
def reference_of(tiny_m3: Checkpoint, tensors_in: TensorsIn) -> ReferenceOf:
    """The hidden states that an honest session computes in a scheme."""

    def computed(scheme: QuantScheme) -> Float32Array:
        honest = Session(tiny_m3, tensors_in(scheme), scheme, slot_count=1)
        return honest.hidden(self_test_ids(tiny_m3.config), slot=0)

    return computed


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
@pytest.mark.parametrize("scheme", [INT8_ROWS, INT8_GROUPS_32], ids=lambda one: one.name)
def test_an_honest_session_is_taken_at_once(
    open_tiny: OpenTiny,
    tensors_in: TensorsIn,
    compile_as: Compile,
    family: str,
    scheme: QuantScheme,
) -> None:
    tensors_in(scheme)  # or the test is skipped
    checkpoint = open_tiny(family, Pooling.LAST if family == "qwen3" else Pooling.CLS)
    calls = compile_as(Session)
    made = Calibration(checkpoint, slot_count=1).attempt(scheme)
    calls.clear()
    opened = open_session(
        checkpoint, made.tensors, scheme, slot_count=2, reference=made.references[scheme.name]
    )
    assert opened.slot_count == 2
    assert len(calls) == 1


@pytest.mark.parametrize("scheme", [FP32, INT8_ROWS], ids=lambda one: one.name)
def test_wrong_weights_are_found_out_and_compiled_again(
    tiny_m3: Checkpoint,
    tensors_in: TensorsIn,
    reference_of: ReferenceOf,
    compile_as: Compile,
    scheme: QuantScheme,
) -> None:
    reference = reference_of(scheme)
    calls = compile_as(wrong, Session)
    open_session(tiny_m3, tensors_in(scheme), scheme, slot_count=1, reference=reference)
    assert calls == [wrong, Session]


def test_a_start_from_the_cache_stops_where_weights_stay_wrong(
    tiny_m3: Checkpoint, tmp_path: Path, compile_as: Compile
) -> None:
    def load() -> OpenVinoBackend:
        return OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path)

    load()
    calls = compile_as(wrong)
    with pytest.raises(StartError, match="wrong vectors in int8-"):
        load()
    assert len(calls) == COMPILES_MAX


@pytest.mark.parametrize("kind", [LastSlotDiffers, LastSlotDiffersOfMany, WrongOfMany])
def test_slots_or_rows_that_differ_stop_the_start_even_without_a_reference(
    tiny_m3: Checkpoint, tensors_in: TensorsIn, compile_as: Compile, kind: type[Session]
) -> None:
    compile_as(kind)
    tensors = tensors_in(FP32)
    with pytest.raises(StartError, match="wrong vectors in fp32"):
        open_session(tiny_m3, tensors, FP32, slot_count=2)


def test_a_result_of_another_shape_agrees_with_nothing(
    tiny_m3: Checkpoint, tensors_in: TensorsIn, compile_as: Compile
) -> None:
    calls = compile_as(Silent)
    tensors = tensors_in(INT8_ROWS)
    with pytest.raises(WrongOutputShape, match="wrong vectors in int8-rows"):
        open_session(tiny_m3, tensors, INT8_ROWS, slot_count=2)
    assert len(calls) == COMPILES_MAX


Silence = Callable[[Callable[[QuantScheme], bool]], None]


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch, compile_as: Compile) -> Silence:
    """Let nothing be computed in the schemes that are named."""

    def chosen(is_silent: Callable[[QuantScheme], bool]) -> None:
        def make(
            checkpoint: Checkpoint, tensors: Tensors, scheme: QuantScheme, **named: object
        ) -> Session:
            kind = Silent if is_silent(scheme) else Session
            return kind(checkpoint, tensors, scheme, **named)  # type: ignore[arg-type]

        calibrate = "trivec.backends.openvino.calibrate"
        equal = ProductTrial(speed=2.0, exact_bits=8, weights_only=False)
        forms = (INT8_ROWS, INT8_CONV, INT8_GROUPS_128)
        monkeypatch.setattr(f"{calibrate}.bf16_pays", lambda _: True)
        monkeypatch.setattr(f"{calibrate}.try_products", lambda *_: dict.fromkeys(forms, equal))
        compile_as(make)

    return chosen


def test_where_a_scheme_computes_nothing_the_next_is_tried(
    tiny_m3: Checkpoint, silence: Silence
) -> None:
    silence(lambda scheme: scheme == INT8_ROWS_BF16)
    found = best_int8(tiny_m3, slot_count=1)
    assert found.scheme.name in found.references
    assert found.certificate.refused[0] == INT8_ROWS_BF16.name


def test_of_schemes_that_fail_the_last_that_computes_is_the_one(
    tiny_m3: Checkpoint, silence: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 that was asked for by name is given though it failed, so it must be one that runs."""
    silence(lambda scheme: scheme.group_size is not None)
    monkeypatch.setattr("trivec.backends.openvino.calibrate.COSINE_MIN", 2.0)  # nothing passes
    kept: list[Tensors] = []

    def keep(tensors: Tensors) -> Tensors:
        kept.append(tensors)
        return tensors

    found = best_int8(tiny_m3, slot_count=1, keep=keep)
    assert found.scheme == INT8_ROWS
    assert INT8_ROWS.name in found.references
    assert kept[-1] is found.tensors  # though others were tried after it
    assert len(kept) > 2


def test_where_no_int8_computes_auto_is_fp32(
    tiny_m3: Checkpoint, silence: Silence, tmp_path: Path
) -> None:
    silence(lambda scheme: scheme in INT8_SCHEMES)
    backend = OpenVinoBackend.load(tiny_m3, precision="auto", cores=1, cache_dir=tmp_path)
    assert backend.precision == "fp32"
    assert backend.certificate is not None
    assert "dense -1.0000 min" in backend.certificate.summary
