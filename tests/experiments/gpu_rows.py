"""Measurements for the tests of bench.py gpu: what may happen to a row."""

import os
import sys
import time


def fine(batch=1, value=3, seconds=0.0, journal=None):
    print("what a library prints")
    time.sleep(seconds)
    if journal:
        with open(journal, "a") as file:
            file.write(f"{os.getpid()}\n")
    return {"value": value, "batch": batch}


def crash():
    os.abort()


def leave():
    sys.exit(3)


def fail():
    raise ValueError("the first line\nand a second")


def hang(pids=None):
    """Sleep, with a child that sleeps too."""
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    if pids:
        with open(pids, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def memory(batch=1, fits=1):
    if batch > fits:
        import jax.numpy as jnp

        jnp.zeros(2**48).block_until_ready()
    return {"batch": batch}


def killed():
    os.kill(os.getpid(), 9)


def absent():
    import a_package_that_is_not_there.inside  # noqa: F401


def on_a_cpu():
    return {"device": "cpu"}
