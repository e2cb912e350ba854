"""The command in this process."""

from tests.cli.conftest import stablelora  # noqa: F401
