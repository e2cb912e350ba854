"""The command in this process."""

import pytest

from stablelora_jax.cli.main import main


@pytest.fixture
def stablelora(capsys):
    """``stablelora`` with these words: (exit code, standard output, standard error)."""

    def call(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call
