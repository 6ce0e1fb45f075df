import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.adapted import adapted
from support.judge import Server
from support.tokenizer import save_backbone

from milora.evaluation import measurement
from milora.evaluation.predictions import Predictions
from milora.inference.generation import GeneratedText
from milora.tasks.task import Task
from milora_cli.main import main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone `base`, an adapter `a` for it, and another backbone."""
    root = tmp_path_factory.mktemp("workspace")
    base = save_backbone(root / "base")
    save_backbone(root / "gpt2", "gpt2")
    model = adapted("llama").model
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(root / "a")
    return root


@pytest.fixture(autouse=True)
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["evaluate", *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["evaluate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("milora: ")
    return captured.err


def test_tasks_of_an_adapter_as_json_files_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    arguments = ["--adapter", "a", "--limit", "3", "--output-dir", str(folder), "--perplexity"]
    printed = result(capsys, *arguments, "--task", "bundled-choice,bundled-yesno")
    assert list(printed["tasks"]) == ["bundled-choice", "bundled-yesno"]
    assert json.loads((folder / "results.json").read_text()) == printed
    of_choice = printed["tasks"]["bundled-choice"]
    assert (of_choice["rows"], of_choice["correct"], of_choice["unparsed"], of_choice["generated"]) == (3, 0, 3, 3)
    assert (printed["mean"], of_choice["accuracy"]) == (0, 0)
    assert of_choice["perplexity"] > 1
    lines = [json.loads(line) for line in (folder / "bundled-choice.jsonl").read_text().splitlines()]
    assert {len(line["route"]) for line in lines} == {7}
    again = result(capsys, *arguments, "--task", "bundled-choice", "--task", "bundled-yesno")
    assert [of_task["generated"] for of_task in again["tasks"].values()] == [0, 0]
    assert main(["evaluate", *arguments, "--task", "bundled-choice"]) == 0
    table = capsys.readouterr().out
    assert "bundled-choice" in table
    assert "0.0% - 56.1%" in table
    assert "groups" not in table
    other = complaint(capsys, "--backbone", "base", *arguments[2:], "--task", "bundled-choice")
    assert "results.json has results with another adapter ('a', and now None)" in other
    (folder / "results.json").unlink()
    other = complaint(capsys, "--backbone", "base", *arguments[2:], "--task", "bundled-choice")
    assert "line 1 is of a run with another adapter" in other


def test_results_of_other_tasks_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    shared = ["--backbone", "base", "--output-dir", str(tmp_path), "--no-generate", "--perplexity"]
    first = result(capsys, *shared, "--limit", "2", "--task", "bundled-choice")
    second = result(capsys, *shared, "--limit", "2", "--task", "bundled-yesno")
    assert list(second["tasks"]) == ["bundled-yesno"]
    assert json.loads(path.read_text())["tasks"] == {**first["tasks"], **second["tasks"]}
    before = path.read_bytes()
    refused = complaint(capsys, *shared, "--limit", "3", "--task", "bundled-choice")
    assert "another limit (2, and now 3): give another --output-dir, or remove the file" in refused
    refused = complaint(capsys, *shared, "--limit", "2", "--dtype", "bfloat16", "--task", "bundled-choice")
    assert "another model" in refused
    assert path.read_bytes() == before
    result(capsys, *shared, "--limit", "3", "--task", "bundled-choice,bundled-yesno")
    both = json.loads(path.read_text())
    asked = [of_task["perplexity_rows"] + of_task["perplexity_no_room"] for of_task in both["tasks"].values()]
    assert (both["limit"], asked) == (3, [3, 3])
    path.write_text("[]")
    assert "is no file of results" in complaint(capsys, *shared, "--limit", "3", "--task", "bundled-choice")


def test_figures_of_one_task_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    shared = ["--backbone", "base", "--output-dir", str(tmp_path), "--limit", "2", "--task", "bundled-choice"]
    measured = result(capsys, *shared, "--no-generate", "--perplexity")["tasks"]["bundled-choice"]
    answered = result(capsys, *shared)["tasks"]["bundled-choice"]
    assert "perplexity" not in answered
    kept = json.loads(path.read_text())
    assert kept["tasks"]["bundled-choice"] == {**measured, **answered}
    assert kept["mean"] == answered["accuracy"]
    again = result(capsys, *shared, "--no-generate", "--perplexity")["tasks"]["bundled-choice"]
    assert again == measured
    assert json.loads(path.read_text()) == kept
    refused = complaint(capsys, *shared, "--limit", "3", "--no-generate", "--perplexity")
    assert "another limit (2, and now 3)" in refused


def test_shots_are_solved_questions_before_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, rows in (("dev", 5), ("test", 2)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        lines = [f"{split} question {row}?,a,b,c,d,B\n" for row in range(rows)]
        (tmp_path / "mmlu" / split / f"anatomy_{split}.csv").write_text("".join(lines))
    out = tmp_path / "out"
    arguments = ["--backbone", "base", "--task", "mmlu", "--data-dir", str(tmp_path), "--output-dir", str(out)]
    assert result(capsys, *arguments, "--shots", "2")["tasks"]["mmlu"]["shots"] == 2
    prompts = [json.loads(line)["prompt"] for line in (out / "mmlu.jsonl").read_text().splitlines()]
    assert [(prompt.count("dev question"), prompt.count("Answer: B")) for prompt in prompts] == [(2, 2), (2, 2)]
    assert "results of mmlu with 2 shots, and now 5" in complaint(capsys, *arguments)
    assert "shots is 6, but anatomy has 5" in complaint(capsys, *arguments, "--shots", "6")
    refused = complaint(capsys, *arguments, "--shots", "2", "--task", "boolq")
    assert "--shots is for mmlu and bbh: boolq has no solved examples" in refused


def test_a_bare_backbone_and_perplexity_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backbone", "base", "--task", "bundled-choice", "--limit", "2"]
    bare = result(capsys, *arguments, "--perplexity", "--no-generate", "--split", "dev")
    assert bare["mean"] is None
    assert bare["tasks"]["bundled-choice"]["perplexity_rows"] == 2
    assert "accuracy" not in bare["tasks"]["bundled-choice"]
    assert bare["adapter"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "bundled-choise", "--adapter", "a"], "did you mean 'bundled-choice'"),
        (["--task", ",", "--adapter", "a"], "has no names"),
        (["--adapter", "a"], "--task"),
        (["--task", "bundled-choice", "--adapter", "aa"], "did you mean 'a'"),
        (["--task", "bundled-choice"], "--backbone"),
        (["--task", "bundled-choice", "--adapter", "a", "--backbone", "gpt2"], "gpt2|adapter"),
        (["--task", "bundled-choice", "--adapter", "a", "--split", "testing"], "'testing'"),
        (["--task", "bundled-choice,boolq", "--adapter", "none", "--data-dir", "nowhere"], "nowhere"),
        (["--task", "bundled-choice", "--adapter", "a", "--no-generate"], "Nothing to measure"),
        (["--task", "bundled-choice", "--adapter", "a", "--limit", "1", "--output-dir", "a/adapter_config.json"], "a/"),
    ],
)
def test_mistakes_name_the_thing(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = complaint(capsys, *arguments)
    assert any(part in found for part in said.split("|"))


def test_accuracy_by_the_rule_of_llm_adapters_stands_beside_the_strict_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boolq").mkdir()
    rows = [{"instruction": f"q{n}", "input": "", "output": "o", "answer": "true"} for n in range(2)]
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(rows))
    # Fixed generated texts, on which the two scoring rules disagree.
    monkeypatch.setattr(Predictions, "add", says("It cannot be true.", Predictions.add))
    arguments = ["--backbone", "tiny", "--task", "boolq,bundled-choice", "--limit", "2", "--data-dir", str(tmp_path)]
    arguments += ["--output-dir", str(tmp_path / "out"), "--max-new-tokens", "1"]
    printed = result(capsys, *arguments)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text())
    assert printed["tasks"]["boolq"]["accuracy"] == 0
    assert printed["tasks"]["boolq"]["llm_adapters"]["accuracy"] == 1
    assert printed["tasks"]["bundled-choice"]["llm_adapters"] is None
    assert (printed["mean"], printed["llm_adapters_mean"]) == (0, 1)
    assert main(["evaluate", *arguments]) == 0
    table = capsys.readouterr().out
    assert "accuracy, strict" in table
    assert "accuracy, LLM-Adapters' rule" in table


def says(output: str, add: Any) -> Any:
    def changed(predictions: Predictions, index: int, text: GeneratedText) -> None:
        add(predictions, index, replace(text, text=output))

    return changed


def test_a_task_can_be_measured_in_a_way_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(_model: object, _tokenizer: object, task: Task, settings: object, _progress: object) -> dict:
        return {"score": 7.5, "task": task.name}

    monkeypatch.setitem(measurement.EVALUATORS, "bundled-yesno", judged)
    printed = result(capsys, "--backbone", "base", "--task", "bundled-yesno,bundled-choice", "--limit", "1")
    assert printed["tasks"]["bundled-yesno"] == {"score": 7.5, "task": "bundled-yesno"}
    assert printed["mean"] == printed["tasks"]["bundled-choice"]["accuracy"]


def _rows(path: Path) -> Iterator[str]:
    return (line for line in path.read_text().split("\n")[:-1]) if path.exists() else iter(())


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--adapter", "a", "--task", "bundled-yesno", "--limit", "60", "--batch-size", "1", "--output-dir"]
    path = tmp_path / "killed" / "bundled-yesno.jsonl"
    command = [sys.executable, "-m", "milora", "evaluate", *shared, str(path.parent)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(_rows(path))) < 3:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.005)
    # A process keeps the folder locked while it lives, even when stopped.
    killed.send_signal(signal.SIGSTOP)
    refused = complaint(capsys, *shared[:3], "bundled-choice", *shared[4:], str(path.parent))
    assert f"killed is in use by process {killed.pid} on " in refused
    assert "use another --output-dir" in refused
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    done = list(_rows(path))
    assert 3 <= len(done) < 60
    # A kill in the middle of a write leaves a partial line.
    with path.open("ab") as file:
        file.write('{"row": 59, "prompt": "\u00e9'.encode()[:-1])
    found = result(capsys, *shared, str(path.parent))["tasks"]["bundled-yesno"]
    assert (found["rows"], found["generated"]) == (60, 60 - len(done))
    assert list(_rows(path))[: len(done)] == done
    result(capsys, *shared, str(tmp_path / "whole"))
    assert sorted(_rows(path)) == sorted(_rows(tmp_path / "whole" / "bundled-yesno.jsonl"))


@pytest.mark.slow
def test_standard_output_is_the_result_alone() -> None:
    arguments = ["--backbone", "base", "--task", "bundled-choice", "--limit", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "milora", "evaluate", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tasks"]["bundled-choice"]["rows"] == 2


class TestMtBench:
    @pytest.fixture
    def judge(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
        monkeypatch.setenv("MILORA_JUDGE_API_KEY", "secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server = Server()
        yield server
        server.close()

    @pytest.fixture
    def arguments(self, tmp_path: Path) -> list[str]:
        (tmp_path / "mt_bench").mkdir()
        question = {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]}
        (tmp_path / "mt_bench" / "question.jsonl").write_text(json.dumps(question) + "\n")
        answers = {"question_id": 81, "model_id": "other", "choices": [{"index": 0, "turns": ["x", "y"]}]}
        (tmp_path / "other.jsonl").write_text(json.dumps(answers) + "\n")
        return ["--backbone", "tiny", "--max-new-tokens", "3", "--task", "mt-bench", "--data-dir", str(tmp_path)]

    def test_answers_are_graded_and_compared(
        self, judge: Server, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        judge.reply = lambda body, number: "[[6]] [[A]]"
        arguments += ["--judge-url", judge.url, "--judge-model", "j", "--compare-with", str(tmp_path / "other.jsonl")]
        arguments += ["--output-dir", str(tmp_path / "out"), "--model-id", "mine"]
        printed = result(capsys, *arguments)["tasks"]["mt-bench"]
        assert (printed["score"], printed["unparsed"], printed["pairwise"]["ties"]) == (6, 0, 2)
        assert len(judge.requests) == 2 + 4
        assert {headers["Authorization"] for headers in judge.headers} == {"Bearer secret"}
        assert result(capsys, *arguments)["tasks"]["mt-bench"] == printed
        assert len(judge.requests) == 6
        assert main(["evaluate", *arguments]) == 0
        assert "6.000" in capsys.readouterr().out

    def test_what_an_earlier_call_measured_is_kept(
        self, judge: Server, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments += ["--output-dir", str(tmp_path / "out"), "--model-id", "mine"]
        judged = result(capsys, *arguments, "--judge-url", judge.url)["tasks"]["mt-bench"]
        assert judged["score"] == 7
        unjudged = result(capsys, *arguments)["tasks"]["mt-bench"]
        assert "score" not in unjudged
        assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["mt-bench"] == judged

    @pytest.mark.parametrize("as_json", [False, True])
    def test_judgements_that_could_not_be_had_are_no_success(
        self, judge: Server, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
    ) -> None:
        judge.reply = lambda body, number: (400, {}, "too\nlong") if number == 1 else "[[5]] [[C]]"
        arguments += ["--judge-url", judge.url, "--output-dir", str(tmp_path / "out"), "--judge-workers", "1"]
        assert main(["evaluate", *arguments, *(["--json"] if as_json else [])]) == 1
        captured = capsys.readouterr()
        said = [line for line in captured.err.splitlines() if line.startswith("milora: ")]
        assert len(said) == 1
        assert "mt-bench: 1 judgement could not be had" in said[0]
        assert "too long" in said[0]
        kept = json.loads((tmp_path / "out" / "results.json").read_text())
        assert (kept["tasks"]["mt-bench"]["failed"], kept["tasks"]["mt-bench"]["score"]) == (1, 5)
        if as_json:
            assert json.loads(captured.out) == kept
            assert captured.err.count("\n") == 1
        assert result(capsys, *arguments)["tasks"]["mt-bench"]["failed"] == 0

    def test_turns_without_room_are_on_the_screen(
        self, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # 128 positions, one character per token.
        arguments = ["--backbone", "base", *arguments[2:], "--output-dir", str(tmp_path / "out")]
        assert main(["evaluate", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        heads, cells = (line for line in lines if "no room" in line or "mt-bench" in line)
        assert [head.strip() for head in heads.strip("┃").split("┃")] == ["task", "rows", "no room"]
        assert [cell.strip() for cell in cells.strip("│").split("│")] == ["mt-bench", "1", "2"]

    def test_a_judge_that_refuses_leaves_the_answers(
        self, judge: Server, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        judge.reply = lambda body, number: (401, {}, "")
        arguments += ["--judge-url", judge.url, "--output-dir", str(tmp_path / "out")]
        assert "refuses (401)" in complaint(capsys, *arguments)
        assert len((tmp_path / "out" / "mt-bench" / "model_answer").glob("*").__next__().read_text().splitlines()) == 1

    def test_mistakes(self, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--output-dir" in complaint(capsys, *arguments)
        other = str(tmp_path / "other.jsonl")
        assert "--judge-url" in complaint(capsys, *arguments, "--output-dir", str(tmp_path), "--compare-with", other)

    def test_an_opponent_that_lacks_an_answer(
        self, judge: Server, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with (tmp_path / "mt_bench" / "question.jsonl").open("a") as file:
            file.write(json.dumps({"question_id": 82, "category": "math", "turns": ["1?", "2?"]}) + "\n")
        judge.reply = lambda body, number: "[[6]] [[A]]"
        arguments += ["--judge-url", judge.url, "--compare-with", str(tmp_path / "other.jsonl")]
        arguments += ["--output-dir", str(tmp_path / "out")]
        assert "other.jsonl has no answer to question 82" in complaint(capsys, *arguments)
        assert not judge.requests
        assert not (tmp_path / "out").exists()
        assert result(capsys, *arguments, "--limit", "1")["tasks"]["mt-bench"]["pairwise"]["ties"] == 2
