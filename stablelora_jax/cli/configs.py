"""The configurations that come with the package: the repository's ``configs/``, found by name.

``stablelora_jax/assets/configs`` is a link to that folder, which a wheel resolves to the files.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from stablelora_jax.utils.errors import InputError

DEFAULT = "default"
FOLDER = Path(__file__).parents[1] / "assets" / "configs"
SOURCE = Path(__file__).parents[2] / "configs"  # of a source tree, where the file system has no links


def folder() -> Path:
    """The folder of the configurations."""
    return FOLDER.resolve() if FOLDER.is_dir() else SOURCE


def names() -> list[str]:
    """Their names: paths below the folder, without ``.yaml``; ``paper/...`` last."""
    found = [path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml")]
    return sorted(found, key=lambda name: ("/" in name, name))


def find(name: str) -> str:
    """The path of the file ``name``, or else of the configuration of that name.

    Anything that exists is taken as a file, and so is a name with the suffix of a YAML file that is no configuration's.

    Raises:
      InputError: there is no configuration of that name.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return name
    known = names()
    plain = name.removesuffix(".yaml")
    if plain in known:
        return str(folder() / f"{plain}.yaml")
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        return name  # the reader says that it cannot be read
    near = difflib.get_close_matches(plain[:80], known, n=3, cutoff=0.6) or [one for one in known if plain in one][:3]
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise InputError(
        f"there is no configuration {name!r:.80}: {hint}'stablelora train --list-configs' lists all, and the name of a "
        "file ends in .yaml"
    )
