"""Signals become flags, once."""

import os
import signal

import pytest

from fm9g.train.signals import SignalHandler


def test_the_first_signal_is_a_request_and_the_second_acts_as_usual(capsys: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGINT)
    with SignalHandler("stopping soon") as handler:
        os.kill(os.getpid(), signal.SIGINT)
        assert (handler.stop_requested, handler.save_requested) == (True, False)
        assert capsys.readouterr().err == "SIGINT: stopping soon; Ctrl-C again ends at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_sigusr1_asks_to_save() -> None:
    with SignalHandler() as handler:
        signal.raise_signal(signal.SIGUSR1)
        assert (handler.stop_requested, handler.save_requested) == (False, True)
