"""What goes wrong in a way that a person can mend: always one line that names the thing and the way out.

:class:`InputError` is raised by every door into the package (a configuration key, a pattern, a file, a shape);
:class:`RunError` where the surroundings break a run that was under way; :class:`Interrupted` where somebody asked it to
stop. The scripts in ``experiments/`` print the line and end with exit code 2, 1, and 128 + the signal's number.
"""

from __future__ import annotations


class InputError(ValueError):
    """What the caller gave cannot be used; ``str(error)`` is one line that names it and says what would work."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class RunError(RuntimeError):
    """A run cannot go on (a full disk, losses that are not finite); what was saved before is whole."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and everything is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def _one_line(message: str) -> str:
    """``message`` without line breaks, which a path may hold, and as what can be printed: half a surrogate cannot."""
    return " ".join(message.splitlines()).encode("utf-8", "backslashreplace").decode()


def brief(error: BaseException) -> str:
    """What another library's error says, as at most 200 characters of one line."""
    return " ".join(str(error).split())[:200]


def named(error: BaseException) -> str:
    """:func:`brief` with the error's kind, for libraries whose texts alone say too little."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
