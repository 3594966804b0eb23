"""Which device calls are running, since when, and whether one has hung. It knows no thread."""

from dataclasses import dataclass

from trivec.core.ports import Clock

CALL_S_MIN = 15.0  # no call is late before this
CALL_RATIO_MAX = 5.0  # nor before this many times its expected duration


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One device call under way."""

    slot: int
    model: str
    running_s: float
    bound_s: float

    @property
    def is_late(self) -> bool:
        return self.running_s > self.bound_s


@dataclass(frozen=True, slots=True)
class _Call:
    model: str
    began_s: float
    bound_s: float


class Calls:
    """The call each slot is in. A slot's own thread writes; anyone reads, without a lock."""

    def __init__(self, slot_count: int, clock: Clock) -> None:
        self._clock = clock
        self._calls: list[_Call | None] = [None] * slot_count
        self._suspect: _Call | None = None

    def began(self, slot: int, model: str, expected_s: float) -> None:
        bound_s = max(CALL_S_MIN, CALL_RATIO_MAX * expected_s)
        self._calls[slot] = _Call(model, self._clock.now_s(), bound_s)

    def ended(self, slot: int) -> None:
        self._calls[slot] = None

    def beats(self) -> tuple[Heartbeat, ...]:
        now_s = self._clock.now_s()
        return tuple(
            Heartbeat(slot, call.model, now_s - call.began_s, call.bound_s)
            for slot, call in enumerate(self._calls)
            if call is not None
        )

    def hung(self) -> Heartbeat | None:
        """A call found late twice in a row.

        Once is not enough: when the whole process was stopped for a while, every call looks late
        as it goes on. Call this from one thread, at least a second apart.
        """
        late = next((beat for beat in self.beats() if beat.is_late), None)
        call = self._calls[late.slot] if late is not None else None
        is_known = call is not None and call is self._suspect
        self._suspect = call
        return late if is_known else None

    def next_look_s(self) -> float:
        """Seconds until a call could next be found late: those that begin later take longer."""
        if self._suspect is not None:
            return 1.0
        left = [beat.bound_s - beat.running_s for beat in self.beats()]
        return max(0.1, min([CALL_S_MIN, *left]))
