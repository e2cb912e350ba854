"""Signals are noted once, and then do what they always do."""

import os
import signal
import threading

import pytest

from stablelora_jax.utils.signals import listening


@pytest.fixture(autouse=True)
def interruptible():
    """What started the tests may ignore SIGINT: so does a shell for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_noted_and_the_second_acts(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with listening() as came:
        assert came() == 0
        os.kill(os.getpid(), number)
        assert came() == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert came() == number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_nothing_comes():
    found = []

    def work():
        with listening() as came:
            found.append(came())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]
