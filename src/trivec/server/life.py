"""The life of the serving process as one state machine, and what the probes read of it.

Pure: it knows which stage follows which and why, not clocks, sockets or signals; `serving` owns
those and obeys.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from trivec.core.health import Health, Phase
from trivec.settings import Life as LifeSettings

BROKEN_EXIT_CODE = 70  # EX_SOFTWARE: a supervisor should start the process again
REFUSAL_S_MAX = 2.0  # for answering 503 to whoever is still waiting, before leaving all the same


class Stage(Enum):
    """Where the process is. `REFUSING` answers all that still waits 503; `GONE` is the end."""

    LOADING = auto()
    SERVING = auto()
    LINGERING = auto()  # asked to stop: still listening and answering, no longer ready
    FINISHING = auto()  # not listening; what was accepted is finished
    REFUSING = auto()
    GONE = auto()


class Happening(Enum):
    """What moves the process on."""

    LOADED = auto()
    FAILED = auto()  # a model could not be loaded
    ASKED = auto()  # SIGTERM, SIGQUIT, Ctrl-C
    INTERRUPTED = auto()  # Ctrl-C while no request is in flight
    HUNG = auto()  # a worker is past its heartbeat bound, or its device is lost
    TIME_UP = auto()  # the stage has lasted as long as it may
    EMPTY = auto()  # granian has ended: the last connection is closed


NEXT: Mapping[tuple[Stage, Happening], Stage] = {
    (Stage.LOADING, Happening.LOADED): Stage.SERVING,
    (Stage.LOADING, Happening.FAILED): Stage.GONE,
    (Stage.LOADING, Happening.ASKED): Stage.GONE,
    (Stage.LOADING, Happening.EMPTY): Stage.GONE,
    (Stage.SERVING, Happening.ASKED): Stage.LINGERING,
    (Stage.SERVING, Happening.INTERRUPTED): Stage.FINISHING,
    (Stage.SERVING, Happening.HUNG): Stage.REFUSING,
    (Stage.SERVING, Happening.EMPTY): Stage.GONE,
    (Stage.LINGERING, Happening.TIME_UP): Stage.FINISHING,
    (Stage.LINGERING, Happening.ASKED): Stage.REFUSING,
    (Stage.LINGERING, Happening.HUNG): Stage.REFUSING,
    (Stage.LINGERING, Happening.EMPTY): Stage.GONE,
    (Stage.FINISHING, Happening.EMPTY): Stage.GONE,
    (Stage.FINISHING, Happening.TIME_UP): Stage.REFUSING,
    (Stage.FINISHING, Happening.ASKED): Stage.REFUSING,
    (Stage.FINISHING, Happening.HUNG): Stage.REFUSING,
    (Stage.REFUSING, Happening.EMPTY): Stage.GONE,
    (Stage.REFUSING, Happening.TIME_UP): Stage.GONE,
}

WELL = Health("ready", alive=True, ready=True, reason="ok")

PHASES: Mapping[Stage, Phase] = {
    Stage.LOADING: "loading",
    Stage.SERVING: "ready",
    Stage.LINGERING: "draining",
    Stage.FINISHING: "draining",
    Stage.REFUSING: "stopped",
    Stage.GONE: "stopped",
}


@dataclass(frozen=True, slots=True)
class Life:
    """Where the process is, and the code that it will leave with."""

    stage: Stage = Stage.LOADING
    exit_code: int = 0

    @property
    def phase(self) -> Phase:
        return PHASES[self.stage]

    def after(self, happening: Happening) -> "Life":
        """The next state; whatever does not matter in this stage changes nothing."""
        stage = NEXT.get((self.stage, happening), self.stage)
        moved = stage is not self.stage
        broken = happening is Happening.HUNG or (
            happening is Happening.EMPTY and self.stage not in (Stage.FINISHING, Stage.REFUSING)
        )
        return Life(stage, BROKEN_EXIT_CODE if moved and broken else self.exit_code)


def stage_s_max(stage: Stage, settings: LifeSettings) -> float | None:
    """Seconds that *stage* may last; None for as long as nothing happens."""
    return {
        Stage.LINGERING: settings.drain_grace_s,
        Stage.FINISHING: settings.drain_s_max,
        Stage.REFUSING: REFUSAL_S_MAX,
    }.get(stage)


def health(life: Life, *, loading: str, hung: str | None, troubles: Iterable[str]) -> Health:
    """What the probes say.

    *loading* says what is being loaded; *hung* what no restart-free cure exists for; *troubles*
    are reasons not to be ready that may pass by themselves: a canary that changed, a store that
    cannot be written.
    """
    phase, passing = life.phase, tuple(troubles)
    if phase == "ready" and hung is None and not passing:  # asked twice by every request
        return WELL
    reasons = {
        "loading": (f"loading: {loading}",),
        "draining": ("draining: asked to stop",),
        "stopped": ("draining: about to leave",),
        "ready": (),
    }[phase]
    everything = [*([hung] if hung else []), *reasons, *passing]
    return Health(
        phase=phase,
        alive=hung is None,
        ready=not everything,
        reason="; ".join(everything) or "ok",
    )
