"""The peers of ``bench.py train``: their names, modes and Python interpreters."""

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
    """The flags that select the peers."""
    add("--peer", metavar="NAMES", help=f"compare with {', '.join(PEERS)}, or both, comma-separated; steps interleaved")
    add(
        "--peer-python",
        action="append",
        metavar="[NAME=]PATH",
        help="Python interpreter of all peers, or of one; may be repeated (default: the current interpreter)",
    )
    add(
        "--peer-modes",
        metavar="MODES",
        help="how peft runs: eager, compile, or both, comma-separated (default: eager; on a GPU both)",
    )


def parse_peers(given: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The names of the sides, ours first, and the interpreters by peer, from the parsed flags.

    Raises:
      InputError: flags that contradict each other, an unknown peer, or an interpreter that does not exist.
    """
    peers = [] if given.peer is None else [name.strip() for name in given.peer.split(",")]
    if set(peers) - set(PEERS) or len(set(peers)) < len(peers):
        raise InputError(f"--peer takes {', '.join(PEERS)}, or both, comma-separated, not {given.peer}")
    if given.peer_modes is not None and "peft" not in peers:
        raise InputError(f"--peer-modes needs --peer{' peft' if peers else ''}")
    if (given.peer_modes or "eager") not in MODES:
        raise InputError(f"--peer-modes takes eager, compile, or both, comma-separated, not {given.peer_modes}")
    modes = (given.peer_modes or ("eager,compile" if on_gpu() else "eager")).split(",")
    runs = {"peft": [f"peft {mode}" for mode in modes]}
    return [OURS, *(name for peer in peers for name in runs.get(peer, [peer]))], parse_interpreters(given, peers)


def parse_interpreters(given: argparse.Namespace, peers: list[str]) -> dict[str, str]:
    """The interpreters that ``--peer-python`` names.

    Raises:
      InputError: there is no such program, or no such peer is parse_peers for.
    """
    found: dict[str, str] = {}
    for text in given.peer_python or ():
        name, _, path = text.partition("=")
        whose, path = ([name], path) if name in PEERS else (peers, text)
        if not set(whose) & set(peers):
            raise InputError(f"--peer-python needs {f'--peer {name}' if name in PEERS else '--peer'}")
        if not shutil.which(os.path.expanduser(path)):
            raise InputError(f"--peer-python {path}: no such program")
        found |= dict.fromkeys(whose, os.path.expanduser(path))
    return found


def on_gpu() -> bool:
    """Whether there is an NVIDIA GPU; does not initialise CUDA."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()
