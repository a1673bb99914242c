import os
import signal
from collections.abc import Iterator

import pytest

from jaxseq.training.signals import Signals, noted

STAYS = "stopping after this step and saving (Ctrl-C again to stop at once)\n"


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which the process would have ended."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own handler, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_with_nothing_to_save_ends_at_once(ends: list[int], capsys, number: int, status: int):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals(exits=True):
        send(number)
    assert ends == [status] and capsys.readouterr().err == "stopping\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_command_that_saves_ends_at_the_second_signal(ends: list[int], capsys):
    with Signals(exits=True) as signals:
        signals.saves = True
        send(signal.SIGINT)
    assert signals.received == signal.SIGINT and ends == [] and capsys.readouterr().err == STAYS
    with Signals(exits=True) as signals:
        signals.saves = True
        send(signal.SIGINT, signal.SIGTERM)
    assert signals.received == signal.SIGINT and ends == [143] and capsys.readouterr().err == STAYS


def test_elsewhere_the_second_signal_acts_as_it_would_have(ends: list[int], capsys):
    with noted() as signals, pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
        assert signals.received == signal.SIGINT
        send(signal.SIGINT)
    assert ends == [] and capsys.readouterr().err == STAYS


def test_inside_a_command_its_signals_are_noted(ends: list[int]):
    with Signals(exits=True) as outer:
        with noted() as inner:
            assert inner is outer
            inner.saves = True
            send(signal.SIGTERM)
        assert outer.received == signal.SIGTERM and not outer.saves


def test_signals_of_others_are_left_to_them(ends: list[int], capsys):
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with Signals(exits=True) as signals:
            send(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert got == [signal.SIGUSR1] and signals.received == 0 and ends == [] and capsys.readouterr().err == ""
