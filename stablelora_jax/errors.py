"""The one exception for input that cannot be used.

Raised by every door into the package (a configuration key, a pattern, a file, a shape). The message is one line that
names the thing and the way out; the scripts in ``experiments/`` print it and end with exit code 2.
"""


class InputError(ValueError):
    """What the caller gave cannot be used; ``str(error)`` is one line that names it and says what would work."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a path may hold a line break
