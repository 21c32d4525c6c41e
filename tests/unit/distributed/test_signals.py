"""A signal waits for the end of a step; a second Ctrl-C does not."""

import os
import signal

import pytest

from scale_sft.distributed import signals
from scale_sft.distributed.signals import Interrupted, Interruption


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_inside_a_step_and_raises_outside(number, capfd):
    interruption = Interruption()
    with interruption.handled():
        with interruption.deferred():
            send(number)
            assert interruption.asked == number.name
        with pytest.raises(Interrupted, match=f"{number.name}: stopped outside of the training loop") as stop:
            send(number)
    assert stop.value.status == 128 + number
    assert ("press again to leave at once" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_a_second_ctrl_c_leaves_at_once_but_one_press_that_arrives_twice_does_not(monkeypatch):
    now = iter([10.0, 10.1, 11.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    interruption = Interruption()
    with interruption.handled(), interruption.deferred():
        send(signal.SIGINT)
        send(signal.SIGINT)  # from the terminal and from the launcher
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert interruption.asked == "SIGINT"


def test_only_rank_0_says_what_ctrl_c_does(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    interruption = Interruption()
    with interruption.handled(), interruption.deferred():
        send(signal.SIGINT)
    assert capfd.readouterr().err == ""
