"""Settings files and `--set`: their meaning, and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_core.errors import MiLoraError
from reproduction.settings import parse_overrides, read_request

FILES = Path(__file__).parents[2] / "reproduction"


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(FILES.glob("bundled*.yaml")), ids=lambda path: path.stem)
def test_the_files_here_can_be_read(path: Path) -> None:
    assert read_request(path).sections


def test_a_file_and_overrides(tmp_path: Path) -> None:
    text = (
        "sections: [1, Figure 3]\ntasks: boolq\ntraining: {max_steps: 5, learning_rate: 1e-3}\ntune: {warmup_steps: 3}"
    )
    overrides = parse_overrides(["training.max_steps=7", "seeds=0,1", "evaluation.beams=1", "backbone=x/y"])
    request = read_request(write(tmp_path, text), overrides)
    assert request.chosen_sections() == ("table1", "figure3")
    assert (request.tasks, request.seeds, request.backbone) == (("boolq",), (0, 1), "x/y")
    assert request.training == {"max_steps": 7, "learning_rate": 0.001}
    assert request.tune == {"warmup_steps": (3,)}
    assert request.evaluation.beams == 1
    again = read_request(write(tmp_path, request.to_yaml()))
    assert again == request, "what a report shows can be read again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold a mapping"),
        ("a: [", "is no YAML"),
        ("task: [boolq]", "task: there is no such setting.*'tasks'"),
        ("tasks: [bolq]", "no task 'bolq'.*'boolq'"),
        ("sections: [table9]", "no section 'table9'"),
        ("training: {max_step: 3}", "no field of training 'max_step'.*'max_steps'"),
        ("methods: {milor: {}}", "no method 'milor'.*'milora'"),
        ("methods: {milora: {topk: 3}}", "no field of milora or of training 'topk'"),
        ("methods: {lora: {learning_rate: [1e-3, 1e-2]}}", "learning_rate is a list.*add it to tune"),
        ("comparisons: {mine: {rows: {a: {method: lorra}}}}", "no method 'lorra'.*'lora'"),
        ("comparisons: {mine: {rows: {a: {method: milora, poler: mean}}}}", "'poler'"),
        ("comparisons: {table1: {rows: {a: {method: lora}}}}", "another name"),
        ("evaluation: {beam: 3}", "evaluation.beam: there is no such setting.*'beams'"),
        ("evaluation: {beams: 0}", "evaluation.beams: .*greater than 0; found 0"),
        ("seeds: []", "seeds: "),
        ("seeds: [-1]", "seeds.0: .*found -1"),
        ("tune: {learning_rate: []}", "tune.learning_rate: "),
        ("budget: large", "budget"),
        ("limits: {figure3: {value: [1]}}", "limits.figure3.value: there is no such setting.*'values'"),
        ("limits: {figure9: {seeds: [1]}}", "no section 'figure9'"),
        ("threads: many", "threads: .*found 'many'"),
        ("backbone: 7", "backbone: .*found 7"),
    ],
)
def test_mistakes_are_named_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MiLoraError, match=message) as caught:
        read_request(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["max_steps", "=3", "a=[1"])
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(MiLoraError, match="--set"):
        parse_overrides([text])
    with pytest.raises(MiLoraError, match="backbone is no mapping"):
        read_request(None, {"backbone": "x", "backbone.name": 3})
