"""What the parent does once a serving process has ended, as a table."""

import signal

import pytest

from trivec.server.supervisor import Ending, Leave, StartAgain, verdict

KILLED = 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("ending", "failed_starts", "ever_ready", "expected"),
    [
        pytest.param(Ending(0, True, True), 0, True, Leave(0), id="asked-and-drained"),
        pytest.param(Ending(143, False, True), 0, False, Leave(0), id="asked-before-it-could-drain"),
        pytest.param(Ending(130, False, True), 0, False, Leave(0), id="ctrl-c-before-it-could-drain"),
        pytest.param(Ending(139, True, True), 0, True, Leave(139), id="asked-and-crashed"),
        pytest.param(Ending(0, True, False), 0, True, Leave(0), id="somebody-asked-the-child-itself"),
        pytest.param(Ending(2, False, False), 0, False, Leave(2), id="a-setting-that-cannot-work"),
        pytest.param(Ending(KILLED, True, False), 3, True, StartAgain(0.0, 0), id="a-crash-at-work"),
        pytest.param(Ending(70, True, False), 0, True, StartAgain(0.0, 0), id="a-hang-at-work"),
        pytest.param(Ending(1, False, False), 0, False, StartAgain(1.0, 1), id="a-crash-at-start"),
        pytest.param(Ending(1, False, False), 2, False, StartAgain(4.0, 3), id="waits-longer"),
        pytest.param(Ending(1, False, False), 4, False, Leave(1), id="gives-up-after-five"),
        pytest.param(Ending(2, False, False), 40, True, StartAgain(30.0, 41), id="once-ready-never"),
    ],
)  # fmt: skip
def test_what_follows(
    ending: Ending, failed_starts: int, ever_ready: bool, expected: Leave | StartAgain
) -> None:
    assert verdict(ending, failed_starts=failed_starts, ever_ready=ever_ready) == expected
