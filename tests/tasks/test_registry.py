from __future__ import annotations

from pathlib import Path

import pytest

from milora.tasks import registry
from milora.tasks.arc import ArcEasy
from milora_core.errors import MiLoraError, did_you_mean

BENCHMARKS = ["arc-easy", "arc-challenge", "obqa", "piqa", "boolq", "aqua", "gsm8k", "mmlu", "bbh"]
BENCHMARKS += ["mt-bench", "alpaca", "mmlu-subject"]


def test_every_name_gives_the_task_of_that_name() -> None:
    assert registry.names() == [*registry.GENERATED_TASKS, *BENCHMARKS]
    assert len(set(registry.names())) == len(registry.names())
    for name in registry.names():
        assert registry.get(name).name == name
        assert registry.get(name).max_new_tokens > 0


def test_a_benchmark_is_given_the_data_folder(tmp_path: Path) -> None:
    task = registry.get("arc-easy", tmp_path)
    assert isinstance(task, ArcEasy)
    assert task.data_dir == tmp_path


@pytest.mark.parametrize(("name", "nearest"), [("arc-eazy", "'arc-easy'"), ("bool-q", "'boolq'")])
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(MiLoraError, match=f"there is no task '{name}'; tasks: .*did you mean .*{nearest}"):
        registry.get(name)


def test_a_name_that_is_near_to_none() -> None:
    with pytest.raises(MiLoraError, match=r"there is no task 'zzzz'; tasks: .*mmlu-subject$"):
        registry.get("zzzz")
    assert did_you_mean("zzzz", []) == ""


def test_settings_reach_the_benchmark_that_has_them(tmp_path: Path) -> None:
    assert registry.get("mmlu", tmp_path, shots=0).shots == 0  # type: ignore[attr-defined]
    assert registry.get("mmlu", tmp_path).shots == 5  # type: ignore[attr-defined]
    with pytest.raises(MiLoraError, match="the task mmlu has no setting 'shot'; its settings: shots"):
        registry.get("mmlu", tmp_path, shot=0)
    for name in ("boolq", "bundled-yesno"):
        with pytest.raises(MiLoraError, match=f"the task {name} has no setting 'shots', and no other"):
            registry.get(name, tmp_path, shots=0)
