"""lm-eval's MMLU, BBH and GSM8K on local files: names, prompts, scores, and errors for bad files."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.adapted import adapted
from support.tokenizer import character_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'milora[eval]'")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from milora.evaluation.lm_eval.hub_rows import read_bbh, read_gsm8k, read_mmlu
from milora.evaluation.lm_eval.local import write_local_tasks
from milora.evaluation.lm_eval.model import MiLoraLM
from milora.tasks.mmlu import CSV_HEADER
from milora_core.errors import DataError

REAL = Path(os.environ.get("MILORA_DATA_DIR", Path(__file__).resolve().parents[4] / "shared" / "data"))


def write_mmlu(file: Path, rows: list[tuple[Any, ...]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([CSV_HEADER, *rows])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskManager, dict[str, Path | None]]:
    """Local tasks with a few made-up rows each: a subject of MMLU, a task of BBH, and GSM8K."""
    root = tmp_path_factory.mktemp("local")
    data = root / "data"
    shot = ("Where is the heart?", "chest", "foot", "hand", "head", 0)
    write_mmlu(data / "mmlu/dev/anatomy_dev.csv", [shot] * 5)
    # A cell with a comma, quotes and a line break.
    write_mmlu(
        data / "mmlu/test/anatomy_test.csv",
        [
            (' Which bone is "long", and\nheavy?', "femur", "stapes", "hyoid, small", "atlas", 0),
            ("Which is in the ear?", "femur", "stapes", "rib", "atlas", 1),
        ],
    )
    (data / "bbh").mkdir()
    (data / "bbh/navigate.json").write_text(
        json.dumps({"canary": "x", "examples": [{"input": "Turn left.\nBack at the start?", "target": "No"}]})
    )
    (data / "gsm8k").mkdir()
    for split in ("train", "test"):
        (data / f"gsm8k/{split}.original.jsonl").write_text(
            "".join(json.dumps({"question": f"{n} and {n}?", "answer": f"Add.\n#### {2 * n}"}) + "\n" for n in range(8))
        )
    return tasks_of(data, root)


def tasks_of(data: Path, root: Path) -> tuple[TaskManager, dict[str, Path | None]]:
    folder = root / "tasks"
    folder.mkdir()
    missing = write_local_tasks(folder, data)
    # lm-eval needs seconds to find its own thousands of tasks.
    return TaskManager(include_path=folder, include_defaults=False), missing


def evaluate(manager: TaskManager, *tasks: str, **settings: Any) -> Any:
    lm = MiLoraLM(pretrained=adapted("llama").model, tokenizer=character_tokenizer(), max_length=1024, batch_size=2)
    return simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )


def test_mmlu_keeps_the_format_of_lm_eval(local: Any) -> None:
    manager, _ = local
    results = evaluate(manager, "mmlu_anatomy_local", num_fewshot=1)
    first = next(sample for sample in results["samples"]["mmlu_anatomy_local"] if sample["doc_id"] == 0)
    context = (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Where is the heart?\nA. chest\nB. foot\nC. hand\nD. head\nAnswer: A\n\n"
        'Which bone is "long", and\nheavy?\nA. femur\nB. stapes\nC. hyoid, small\nD. atlas\nAnswer:'
    )
    assert [tuple(pair) for pair in first["arguments"]] == [(context, f" {letter}") for letter in "ABCD"]
    assert int(first["target"]) == 0
    right = [
        max(range(4), key=lambda index: float(sample["resps"][index][0][0])) == int(sample["target"])
        for sample in results["samples"]["mmlu_anatomy_local"]
    ]
    assert results["results"]["mmlu_anatomy_local"]["acc,none"] == sum(right) / 2


def test_bbh_and_gsm8k_generate(local: Any) -> None:
    manager, _ = local
    results = evaluate(
        manager, "bbh_zeroshot_navigate_local", "gsm8k_local", num_fewshot=0, gen_kwargs={"max_gen_toks": 4}, limit=2
    )
    (navigate,) = results["samples"]["bbh_zeroshot_navigate_local"][:1]
    assert "Turn left.\nBack at the start?" in navigate["arguments"][0][0]
    assert navigate["target"] == "No"
    of_gsm8k = results["samples"]["gsm8k_local"][0]
    assert of_gsm8k["arguments"][0][0] == "Question: 0 and 0?\nAnswer:"
    assert of_gsm8k["target"] == "Add.\n#### 0"


def test_a_part_of_a_benchmark_does_not_pass_for_the_whole(local: Any) -> None:
    manager, missing = local
    assert {name for name, file in missing.items() if file is None} >= {"mmlu_anatomy_local", "gsm8k_local"}
    for group in ("mmlu_local", "mmlu_stem_local", "bbh_zeroshot_local"):
        assert missing[group] is not None
        assert group not in manager.all_tasks
    assert missing["mmlu_stem_local"].name.endswith("_dev.csv")


def test_without_a_folder_the_names_are_known_and_nothing_is_written(tmp_path: Path) -> None:
    missing = write_local_tasks(tmp_path, None)
    assert {"mmlu_local", "bbh_local", "gsm8k_local"} <= set(missing)
    assert None not in missing.values()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "mmlu").is_dir(), reason=f"no mmlu in {REAL}: set MILORA_DATA_DIR")
def test_the_real_benchmarks_are_whole(tmp_path: Path) -> None:
    manager, missing = tasks_of(REAL, tmp_path)
    assert set(missing.values()) == {None}
    mmlu = manager.load("mmlu_local")
    assert len(mmlu["tasks"]) == 57
    assert {"mmlu_local", "mmlu_stem_local", "mmlu_humanities_local", "mmlu_other_local"} < set(mmlu["groups"])
    assert all(len(task.dataset["dev"]) == 5 for task in mmlu["tasks"].values())
    assert sum(len(task.dataset["test"]) for task in mmlu["tasks"].values()) == 14042
    for group in ("bbh_zeroshot_local", "bbh_local"):
        bbh = manager.load(group)
        assert len(bbh["tasks"]) == 27
        assert sum(len(task.dataset["test"]) for task in bbh["tasks"].values()) == 6511
    assert len(manager.load("gsm8k_local")["tasks"]["gsm8k_local"].dataset["test"]) == 1319


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "mmlu").is_dir(), reason=f"no mmlu in {REAL}: set MILORA_DATA_DIR")
def test_the_bundled_backbone_answers_real_questions(tmp_path: Path) -> None:
    manager, _ = tasks_of(REAL, tmp_path)
    results = simple_evaluate(
        model=MiLoraLM(pretrained="tiny", batch_size=4),
        tasks=["mmlu_anatomy_local", "bbh_zeroshot_boolean_expressions_local"],
        task_manager=manager,
        limit=3,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 8},
    )
    assert results["n-samples"]["mmlu_anatomy_local"] == {"original": 135, "effective": 3}
    assert 0 <= results["results"]["mmlu_anatomy_local"]["acc,none"] <= 1
    assert 0 <= results["results"]["bbh_zeroshot_boolean_expressions_local"]["exact_match,flexible-extract"] <= 1


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_mmlu, "question,A,B,C,D,answer\n", "line 1: .* the answer 'answer'"),
        (read_mmlu, ",".join(CSV_HEADER) + "\nq,a,b,c,d,0\nq,a,b,c,1\n", "line 3: 5 columns"),
        (read_mmlu, ",".join(CSV_HEADER) + "\nq,a,b,c,d,E\n", "line 2: .* the answer 'E', .* 0 to 3 or A to D"),
        (read_mmlu, "", "has no questions"),
        (read_bbh, "[]", "`examples` is a list, it must be a list of rows, at least one"),
        (read_bbh, '{"examples": [{"input": "a", "target": "b"}, {"input": "a"}]}', "row 2: `target` is missing"),
        (read_bbh, '{"examples"', "not JSON"),
        (read_gsm8k, '{"question": "a", "answer": "b"}\n\n{"question": 1, "answer": "b"}\n', "line 3: `question`"),
        (read_gsm8k, "[1]\n", "line 1: a row is a list, it must be an object"),
    ],
)
def test_a_bad_file_is_said_with_its_place(read: Any, text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read(file)
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_text_is_said(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(",".join(CSV_HEADER).encode() + b"\nq\xff,a,b,c,d,0\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_mmlu(file)


def test_rows_are_word_for_word_what_the_files_say(tmp_path: Path) -> None:
    """lm-eval's templates control spaces, so nothing is stripped, and our own tasks' wording is not used."""
    file = tmp_path / "rows.jsonl"
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([CSV_HEADER, (" a\u2028b?\n", " 1", "2 ", '"', "", 3)])
    row = {"question": " a\u2028b?\n", "choices": [" 1", "2 ", '"', ""], "answer": 3}
    assert read_mmlu(file) == [row]
    # The format of MMLU's authors.
    file.write_text(file.read_text().replace(",".join(CSV_HEADER) + "\n", "").replace(",3", ",D"))
    assert read_mmlu(file) == [row]
    file.write_text(json.dumps({"canary": "x", "examples": [{"input": " q\n", "target": " (A) ", "more": 1}]}))
    assert read_bbh(file) == [{"input": " q\n", "target": " (A) "}]
    file.write_text(json.dumps({"question": " q\n", "answer": "<<1+1=2>>\n#### 2 ", "more": 1}) + "\n\n")
    assert read_gsm8k(file) == [{"question": " q\n", "answer": "<<1+1=2>>\n#### 2 "}]
