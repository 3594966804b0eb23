"""What was compiled is used only after its slots stood up to plain arithmetic."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.backends.conftest import OpenTiny, SkipUnlessRun
from tests.backends.silent import silent

from trivec.backends.openvino.certifying import Trial, fp32_tensors
from trivec.backends.openvino.packing import Buffers, RowInputs
from trivec.backends.openvino.recipe import FP32, INT8_GROUPS_32, INT8_ROWS, Recipe
from trivec.backends.openvino.session import Session
from trivec.backends.openvino.witness import (
    COMPILES_MAX,
    NothingComputed,
    Plan,
    compiled,
    open_session,
)
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.errors import StartError
from trivec.core.types import Float32Array
from trivec.models.pooling import Pooling

QUERY, INNER = "encoder.layer.0.attention.self.query.weight", "encoder.layer.1.output.dense.weight"


def plan_of(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    if recipe is FP32:
        return Plan(checkpoint.config, fp32_tensors(checkpoint), recipe)
    return Plan(checkpoint.config, Trial(checkpoint, slot_count=1).tensors(recipe), recipe)


def with_wrong_weights(plan: Plan) -> Plan:
    """As if the plugin had given a layer the weights of another."""
    wrong = {name: np.roll(plan.tensors[name], 1, axis=0) for name in (QUERY, INNER)}
    return replace(plan, tensors={**plan.tensors, **wrong})


class Compiler:
    """Compiles each of *plans* in turn, whatever it is asked for, and counts."""

    def __init__(self, *spoil: Callable[[Plan], Plan]) -> None:
        self._spoil = spoil
        self.calls = 0

    def __call__(self, plan: Plan, slot_count: int) -> Session:
        spoil = self._spoil[min(self.calls, len(self._spoil) - 1)]
        self.calls += 1
        return compiled(spoil(plan), slot_count)


def honest(plan: Plan) -> Plan:
    return plan


@pytest.mark.parametrize("recipe", [FP32, INT8_ROWS, INT8_GROUPS_32], ids=lambda one: one.name)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_an_honest_session_is_taken_at_once(
    open_tiny: OpenTiny, skip_unless_run: SkipUnlessRun, family: str, recipe: Recipe
) -> None:
    skip_unless_run(recipe)
    compiler = Compiler(honest)
    plan = plan_of(open_tiny(family, Pooling.CLS), recipe)
    session = open_session(plan, slot_count=2, must_agree=True, compiler=compiler)
    assert session.slot_count == 2
    assert compiler.calls == 1


@pytest.mark.parametrize("recipe", [FP32, INT8_ROWS], ids=lambda one: one.name)
def test_wrong_weights_are_found_out_and_compiled_again(
    tiny_m3: Checkpoint, recipe: Recipe
) -> None:
    compiler = Compiler(with_wrong_weights, honest)
    open_session(plan_of(tiny_m3, recipe), slot_count=1, must_agree=True, compiler=compiler)
    assert compiler.calls == 2


def test_weights_that_stay_wrong_stop_the_start(tiny_m3: Checkpoint) -> None:
    compiler = Compiler(with_wrong_weights)
    with pytest.raises(StartError, match="wrong vectors in int8-rows"):
        open_session(plan_of(tiny_m3, INT8_ROWS), slot_count=1, must_agree=True, compiler=compiler)
    assert compiler.calls == COMPILES_MAX


def test_int8_that_nothing_vouches_for_may_be_far_from_the_witness(tiny_m3: Checkpoint) -> None:
    compiler = Compiler(with_wrong_weights)
    plan = plan_of(tiny_m3, INT8_ROWS)
    open_session(plan, slot_count=2, must_agree=False, compiler=compiler)
    assert compiler.calls == COMPILES_MAX


class SplitSession(Session):
    """Two sound sessions behind one, of which the second slot's is another model's."""

    def __init__(self, first: Session, second: Session) -> None:
        self._each = (first, second)

    @property
    def slot_count(self) -> int:
        return 2

    def buffers(self, slot: int) -> Buffers:
        return self._each[slot].buffers(0)

    def hidden(self, inputs: RowInputs, *, slot: int) -> Float32Array:
        return self._each[slot].hidden(inputs, slot=0)


def test_slots_that_differ_stop_the_start_whatever_vouches(tiny_m3: Checkpoint) -> None:
    def split(plan: Plan, slot_count: int) -> Session:
        return SplitSession(compiled(plan, 1), compiled(with_wrong_weights(plan), 1))

    with pytest.raises(StartError, match="wrong vectors"):
        open_session(plan_of(tiny_m3, FP32), slot_count=2, must_agree=False, compiler=split)


@pytest.mark.parametrize("must_agree", [True, False], ids=["vouched-for", "nothing-vouches"])
def test_a_result_of_another_shape_agrees_with_nothing(
    tiny_m3: Checkpoint, must_agree: bool
) -> None:
    calls = list[Plan]()

    def counted(plan: Plan, slot_count: int) -> Session:
        calls.append(plan)
        return silent(plan, slot_count)

    plan = plan_of(tiny_m3, INT8_ROWS)
    with pytest.raises(NothingComputed, match="wrong vectors in int8-rows"):
        open_session(plan, slot_count=2, must_agree=must_agree, compiler=counted)
    assert len(calls) == COMPILES_MAX
