"""Signals are noted once, and then do what they always do."""

import os
import signal
import threading

import pytest

from stablelora_jax.utils.signals import catch_signals


@pytest.fixture(autouse=True)
def interruptible():
    """What started the tests may ignore SIGINT: so does a shell for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_noted_and_the_second_acts(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals() as received:
        assert received() == 0
        os.kill(os.getpid(), number)
        assert received() == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert received() == number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_nothing_comes():
    found = []

    def work():
        with catch_signals() as received:
            found.append(received())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]
