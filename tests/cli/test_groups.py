"""`milora_cli.groups`: a command that accepts a dataclass gets its fields as Typer options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from milora_cli.groups import with_groups


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--width", min=1, help="From left to right.")] = 3
    unit: Annotated[str | None, typer.Option("--unit", help="Of the width.")] = None


@dataclass(frozen=True)
class SmallSize(Size):
    unit: Annotated[str | None, typer.Option("--unit", help="A small one.")] = "mm"


@dataclass(frozen=True)
class WithoutDefault:
    width: Annotated[int, typer.Option("--width")]


@dataclass(frozen=True)
class Other:
    fast: Annotated[bool, typer.Option("--fast")] = False


def app_of(command: Any) -> typer.Typer:
    app = typer.Typer()
    app.command()(with_groups(command))
    return app


def test_a_command_gets_its_groups_filled_in() -> None:
    got: list[tuple[Any, ...]] = []

    def command(*, size: SmallSize, name: Annotated[str, typer.Option("--name")] = "box", other: Other) -> None:
        """Makes a box."""
        got.append((size, name, other))

    app = app_of(command)
    for arguments in ([], ["--width", "5", "--name", "lid", "--fast"], ["--unit", "cm"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert got == [
        (SmallSize(3, "mm"), "box", Other(False)),
        (SmallSize(5, "mm"), "lid", Other(True)),
        (SmallSize(3, "cm"), "box", Other(False)),
    ]
    # Typer's own checks still apply.
    assert CliRunner().invoke(app, ["--width", "0"]).exit_code == 2
    help_text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120", "TERM": "dumb"}).output
    assert "Makes a box." in help_text
    places = [help_text.index(name) for name in ("--width", "--unit", "--name", "--fast")]
    assert places == sorted(places)
    assert "From left to right." in help_text
    assert "A small one." in help_text


def test_two_options_of_one_name() -> None:
    def command(*, size: Size, other: SmallSize) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):
        with_groups(command)


def test_an_option_without_a_default() -> None:
    def command(*, size: WithoutDefault) -> None: ...

    with pytest.raises(TypeError, match=r"WithoutDefault\.width needs a default"):
        with_groups(command)
