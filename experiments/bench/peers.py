"""The peers of ``bench.py train``: which there are, how each runs, and which interpreter has them."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from bench.turns import MODULES, OURS
from stablelora_jax.utils.errors import InputError

PEERS = tuple(name for name in MODULES if name != OURS)
MODES = ("eager", "compile", "eager,compile", "compile,eager")  # of peft


def add_peer_options(add: Any) -> None:
    """The flags that say what runs beside our side."""
    add("--peer", metavar="NAMES", help=f"do the same work in turn with {', '.join(PEERS)}, or both with a comma")
    add(
        "--peer-python",
        action="append",
        metavar="[NAME=]PATH",
        help="the interpreter whose environment has the peers, or that of one peer; may be repeated (default: this)",
    )
    add(
        "--peer-modes",
        metavar="MODES",
        help="of peft: eager, compile, or both with a comma; default: eager, on a GPU both",
    )


def asked(given: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The sides to measure, ours first, and the interpreters of peers that have one of their own.

    Raises:
      InputError: flags that do not go together, or no such peer or interpreter.
    """
    peers = [] if given.peer is None else [name.strip() for name in given.peer.split(",")]
    if set(peers) - set(PEERS) or len(set(peers)) < len(peers):
        raise InputError(f"--peer takes {', '.join(PEERS)}, or both with a comma, not {given.peer}")
    if given.peer_modes is not None and "peft" not in peers:
        raise InputError(f"--peer-modes says how the peer runs: give --peer{' peft' if peers else ''}, too")
    if (given.peer_modes or "eager") not in MODES:
        raise InputError(f"--peer-modes takes eager, compile, or both with a comma, not {given.peer_modes}")
    modes = (given.peer_modes or ("eager,compile" if on_gpu() else "eager")).split(",")
    runs = {"peft": [f"peft {mode}" for mode in modes]}
    return [OURS, *(name for peer in peers for name in runs.get(peer, [peer]))], pythons(given, peers)


def pythons(given: argparse.Namespace, peers: list[str]) -> dict[str, str]:
    """The interpreters that ``--peer-python`` names.

    Raises:
      InputError: there is no such program, or no such peer is asked for.
    """
    found: dict[str, str] = {}
    for text in given.peer_python or ():
        name, _, path = text.partition("=")
        whose, path = ([name], path) if name in PEERS else (peers, text)
        if not set(whose) & set(peers):
            also = f"--peer {name}" if name in PEERS else "--peer"
            raise InputError(f"--peer-python says where the peer is: give {also}, too")
        if not shutil.which(os.path.expanduser(path)):
            raise InputError(f"--peer-python {path}: there is no such program")
        found |= dict.fromkeys(whose, os.path.expanduser(path))
    return found


def on_gpu() -> bool:
    """Whether there is an NVIDIA GPU, without taking it."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()
