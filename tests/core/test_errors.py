"""The error for a missing extra is one line that names the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

from milora_core.errors import MissingExtraError, importing

WITHOUT_EXTRAS = """
import sys
for library in ("trl", "datasets", "matplotlib", "lm_eval", "openai", "requests"):
    sys.modules[library] = None  # `import` then raises ModuleNotFoundError
from milora_cli.main import main
print("status", main(sys.argv[1:]))
"""


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(MissingExtraError) as raised, importing("train", "Training"):
        import no_such_library.inner  # noqa: F401
    assert str(raised.value) == 'Training needs no_such_library: pip install "milora[train]"'
    assert isinstance(raised.value, ImportError)


def test_a_missing_module_of_our_own_is_a_bug_and_stays_one() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"milora_core\.nothing"), importing("train", "Training"):
        import milora_core.nothing  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("evaluate --backbone tiny --task bundled-choice --limit 1", 0, ""),
        ("generate --backbone tiny --prompt Hello --max-new-tokens 2", 0, ""),
        ("train --backbone tiny --task bundled-choice", 2, 'Training needs trl: pip install "milora[train]"'),
        ("demo", 2, 'Training needs trl: pip install "milora[train]"'),
        ("evaluate --backbone tiny --task boolq", 2, 'needs datasets: pip install "milora[train]"'),
    ],
)
def test_a_command_needs_the_extras_it_uses(arguments: str, status: int, said: str) -> None:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"status {status}", done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == (1 if said else 0)
