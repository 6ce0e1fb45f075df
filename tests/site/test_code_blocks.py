"""The code of the README and the documentation runs as written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from support import documentation
from support.documentation import Block, blocks_of

from milora_cli import train
from milora_cli.main import app

ROOT = Path(__file__).parents[2]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOGS = ("docs/results/",)
"""Pages with measurement records, whose commands take hours."""

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if not str(page.relative_to(ROOT)).startswith(LOGS)
]
RUN = [page for page in PAGES if any(block.runs for block in blocks_of(page))]
COMMAND = re.compile(r"(?:^|&& |; |\$\()milora\s+([^\n|>&;)]*)", re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache in which the real model's name points to the folder that `make smollm2` created."""
    home = tmp_path_factory.mktemp("hub")
    folder = Path(os.environ.get("MILORA_SMOLLM2", "~/.cache/milora/smollm2-135m-instruct")).expanduser()
    if (folder / "config.json").is_file():
        cached = home / "hub" / f"models--{SMOLLM2.replace('/', '--')}"
        snapshot = cached / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            (snapshot / file.name).symlink_to(file)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=_name)
def test_it_runs(page: Path, hub: Path, tmp_path: Path) -> None:
    if SMOLLM2 in page.read_text(encoding="utf-8") and not (hub / "hub").is_dir():
        pytest.skip("needs SmolLM2: make smollm2")
    environment = {
        **os.environ,
        "HF_HOME": str(hub),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
    }
    environment.pop("MILORA_DATA_DIR", None)
    log = tmp_path.with_suffix(".log")
    with log.open("w") as output:
        # In a new session, so servers left behind by a failed page can be killed with it.
        process = subprocess.Popen(
            [sys.executable, documentation.__file__, str(page)],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=600)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, log.read_text(errors="replace")[-6000:]


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "results").rglob("*.md"))], ids=_name)
def test_commands_and_their_options_exist(page: Path) -> None:
    """Checks the options of all blocks, including blocks that do not run."""
    for block in blocks_of(page):
        if block.language == "bash":
            for name, options in _commands(block):
                unknown = options - _options(name)
                assert not unknown, f"{page}:{block.line}: milora {name} has no {', '.join(sorted(unknown))}"


def _commands(block: Block) -> list[tuple[str, set[str]]]:
    """The `milora` commands of a block: sub-command and option names."""
    calls = []
    for text in COMMAND.findall(re.sub(r"\\\n", " ", re.sub(r"\s#.*", "", block.code))):
        words = text.split()
        names = []
        for word in words:
            if not re.fullmatch(r"[a-z][a-z-]*", word) or len(names) == 2:
                break
            names.append(word)
        options = {word.partition("=")[0].replace("_", "-") for word in words if re.match(r"--[a-z]", word)}
        if names:
            calls.append((" ".join(names), options))
    return calls


def _options(name: str) -> set[str]:
    if name == "train":
        return {f"--{option}" for option in train._names(train._parser())} | {"--json", "--help", "--help-all"}
    command = typer.main.get_command(app)
    for part in name.split():
        inner = getattr(command, "commands", {}).get(part)
        if inner is None:
            break
        command = inner
    else:
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        return known | {"--help", "--debug"}
    raise AssertionError(f"There is no milora {name}")


def test_each_block_that_is_not_run_has_a_reason() -> None:
    for page in PAGES:
        count = page.read_text(encoding="utf-8").count("<!-- not run")
        assert count == sum(block.not_run is not None for block in blocks_of(page)), page
