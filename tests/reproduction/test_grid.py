"""The runs that a request needs, and the records that match them."""

from __future__ import annotations

import json
import math

import pytest
from support.grids import TASKS, grid, record

from milora.methods import METHODS
from milora.tuners.milora.config import activations_by_block
from reproduction.grid import Grid, Run
from reproduction.run import _settings
from reproduction.store import key_of

ALWAYS = lambda key: True  # noqa: E731


def runs(of: Grid) -> list[Run]:
    return of.runs()


def test_runs_counted_by_hand() -> None:
    # 13 methods, 2 tasks, 2 seeds.
    assert len(runs(grid(sections=["table1"]))) == 13 * 2 * 2
    # Table 1 has the single-task runs of four methods; each method adds one run on both tasks per seed.
    assert len(runs(grid(sections=["table1", "table2"]))) == 52 + 4 * 2
    # Figure 2 adds no runs.
    assert len(runs(grid(sections=["table1", "figure2"]))) == 52
    # k in 1..7 for two methods; with the paper's settings, Table 1 has MiLoRA's k = 3 and MOELoRA's k = 4.
    assert len(runs(grid(sections=["table1", "figure3"]))) == 52 + 12 * 4
    # Five coefficients including the default 0.01; six ranks for two methods including the default 32.
    whole = ["table1", "table2", "figure2", "figure3", "figure4", "figure5", "table5"]
    assert len(runs(grid(sections=whole))) == 52 + 8 + 48 + 16 + 40 + 20


def test_the_papers_tasks_where_none_or_some_of_them_are_named() -> None:
    columns = {section.name: section.columns for section in grid(sections=["table1", "figure3"], tasks=()).sections}
    assert columns["table1"] == ("arc-easy", "arc-challenge", "boolq", "obqa", "piqa", "aqua", "gsm8k")
    assert columns["figure3"] == ("boolq", "piqa")
    of = grid(sections=["table1", "figure3"], tasks=("boolq", "gsm8k"))
    assert [section.columns for section in of.sections] == [("boolq", "gsm8k"), ("boolq",)]
    assert [section.columns for section in grid(sections=["table1", "figure3"]).sections] == [TASKS, TASKS]


def test_limits_and_methods() -> None:
    limits = {"figure3": {"tasks": ["boolq"], "seeds": [5], "values": [1, 2]}}
    found = runs(grid(sections=["figure3"], only_methods=["milora"], limits=limits))
    assert [(run.settings["top_k"], run.tasks, run.seed) for run in found] == [(1, ("boolq",), 5), (2, ("boolq",), 5)]


def test_comparisons_set_any_field_of_the_method_or_of_training() -> None:
    rows = {"mean": {"method": "milora", "pooler": "mean"}, "long": {"method": "lora", "max_steps": 9, "r": 4}}
    of = grid(comparisons={"mine": {"rows": rows}}, sections=["mine"], seeds=(3,), tasks=TASKS[:1])
    mean, long = runs(of)
    assert (mean.settings["pooler"], mean.training) == ("mean", {})
    assert (long.settings["r"], long.training, long.seed) == (4, {"max_steps": 9}, 3)
    together = {label: {**row, "together": True} for label, row in rows.items()}
    of = grid(comparisons={"mine": {"rows": together}}, sections=["mine"], seeds=(3,))
    assert [(run.tasks, run.tests) for run in runs(of)] == [(TASKS, TASKS)] * 2


def test_a_key_changes_with_all_that_decides_the_outcome_and_with_nothing_else() -> None:
    def key(**settings: object) -> str:
        return runs(grid(**{"sections": ["table1"], "only_methods": ["milora"], "seeds": (0,), **settings}))[0].key

    base = key()
    assert key(sections=["figure2"]) == base
    assert key(training={"learning_rate": 1e-4}) == base, "the paper's rate, said or not"
    assert key(training={"logging_steps": 7}) == base, "what a run prints"
    assert key(methods={"milora": {"gate": "hard"}}) == base, "the default, said or not"
    others = [
        key(seeds=(1,)),
        key(tasks=TASKS[::-1]),
        key(training={"learning_rate": 1e-3}),
        key(data={"train_rows": 5}),
        key(evaluation={"beams": 1}),
        key(methods={"milora": {"gate": "softmax"}}),
        key(methods={"milora": {"router_norm": "none"}}),
        key(backbone="other"),
        key(only_methods=["midora"]),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_records_answer_whatever_their_digests_and_folders_are() -> None:
    settings = {"sections": ["table1"], "only_methods": ["milora"], "seeds": (0,), "tasks": TASKS[:1]}
    (run,) = runs(grid(backbone="/here/llama", **settings))
    made = json.loads(json.dumps(record(run, run="another", fingerprints={})))
    of = grid([made], backbone="somewhere/else/llama", **settings)
    assert of.record(of.cells[0]) == made
    newer = {**made, "finished_at": "later"}
    of.see([made, newer])
    assert of.record(of.cells[0]) == newer, "the newest record counts"
    of.see([{**made, "tests": {}}])
    assert of.record(of.cells[0]) is None, "it was not tested on the task"


def test_records_of_format_1_are_of_routers_without_a_norm() -> None:
    settings = {"sections": ["table1"], "only_methods": ["milora"], "seeds": (0,), "tasks": TASKS[:1]}
    (run,) = runs(grid(**settings))
    old = {"r": 32, "top_k": 3, "normalize_router_input": False}
    made = record(run, format=1, settings=old)
    del made["budget"], made["size"]
    cell = grid(**settings).cells[0]
    assert grid([made], **settings).record(cell) is None, "today's default normalises every token"
    of = grid([made], methods={"milora": {"router_norm": "none"}}, **settings)
    assert of.record(of.cells[0]) == made


def test_a_report_finds_sizes_in_the_records() -> None:
    settings = {"sections": ["table1"], "only_methods": ["lora"], "seeds": (0,), "budget": 100_000}
    made = [record(run) for run in runs(grid(**settings))]
    assert made[0]["settings"]["r"] == 6
    without = Grid(grid(**settings).request, made)
    assert without.size("lora") == {"r": 6}
    assert [without.record(cell) for cell in without.cells] == made
    assert Grid(grid(**settings).request).size("lora") is None


def test_tries_come_first_and_the_best_is_used_for_all_seeds() -> None:
    settings = {
        "sections": ["table1", "figure4"], "only_methods": ["milora"], "tasks": TASKS[:1],
        "tune": {"learning_rate": [1, 2, 3]},
    }  # fmt: skip
    of = grid(**settings)
    of.see([], ALWAYS)
    tries = runs(of)
    assert [(run.seed, run.training["learning_rate"]) for run in tries] == [(0, 1), (0, 2), (0, 3)]
    perplexity = {1: 3.0, 2: 1.5, 3: math.nan}
    made = [record(run, dev_perplexity=perplexity[run.training["learning_rate"]]) for run in tries]
    of.see(made[:2], ALWAYS)
    assert len(runs(of)) == 3, "a try may still come"
    assert sum(one["state"] == "after tuning" for one in of.plan()) == 1 + 4 * 2
    # The third try has failed for now (no record), or has diverged.
    for records in (made[:2], made):
        of.see(records)
        after = runs(of)
        # The second seed, and four other coefficients with two seeds. A try is the first seed's run.
        assert len(after) == 3 + 1 + 4 * 2
        assert {run.training["learning_rate"] for run in after[3:]} == {2}
        assert not [one for one in of.plan() if one["state"] == "after tuning"]


def test_rows_that_are_tuned_one_by_one_and_values_that_a_method_fixes() -> None:
    rows = {gate: {"method": "milora", "gate": gate} for gate in ("hard", "softmax")}
    comparison = {"rows": {**rows, "fixed": {"method": "milora", "learning_rate": 9.0}}}
    settings = {"sections": ["gates"], "tasks": TASKS[:1], "seeds": (0,), "tune": {"learning_rate": [1, 2]}}
    of = grid(comparisons={"gates": {**comparison, "tune_each_row": True}}, **settings)
    of.see([], ALWAYS)
    assert [(run.settings.get("gate"), run.training["learning_rate"]) for run in runs(of)] == [
        ("hard", 1), ("hard", 2), ("softmax", 1), ("softmax", 2), (None, 9.0)
    ]  # fmt: skip
    of = grid(sections=["table2"], methods={"lora": {"learning_rate": 5}, "dora": {"learning_rate": [3, 4]}},
              only_methods=["lora", "dora"], tasks=TASKS[:1], seeds=(0,), tune={"learning_rate": [1, 2]})  # fmt: skip
    of.see([], ALWAYS)
    assert {(run.method, run.training["learning_rate"]) for run in runs(of)} == {("lora", 5), ("dora", 3), ("dora", 4)}


def test_one_run_has_all_tests_of_its_cells() -> None:
    of = grid(sections=["table3", "table5", "table7"], tasks=(), seeds=(0,), other_backbones={"Gemma 2B": "g"})
    alpaca = [run for run in runs(of) if run.tasks == ("alpaca",)]
    # Table 5's first row is MiLoRA from Table 3; then five ablations, and two methods on another backbone.
    assert [run.tests for run in alpaca] == [("mt-bench", "mmlu", "bbh")] * 2 + [("mmlu",)] * (5 + 2)


def test_with_a_judge_mt_bench_needs_its_grade() -> None:
    settings = {"sections": ["table3"], "tasks": (), "seeds": (0,), "only_methods": ["milora"]}
    of = grid(**settings)
    (run,) = runs(of)
    routes = record(run, tests={"mmlu": {}, "bbh": {}}, expert_shares={"mt-bench": {"share": []}})
    of.see([routes])
    assert of.answers(run), "routes are all there is without a judge"
    judged = grid([routes], judge_url="http://127.0.0.1:9/v1", judge_model="j", **settings)
    (run,) = runs(judged)
    assert run.evaluation["judge"] == "j"
    assert not judged.answers(run)
    graded = record(run, tests={"mt-bench": {"judge": "j"}, "mmlu": {}, "bbh": {}})
    judged.see([routes, graded])
    assert judged.answers(run) == [graded]


def test_budgets_reach_the_runs() -> None:
    of = grid(sections=["table1", "figure3"], only_methods=["moelora"], budget="milora", tasks=TASKS[:1], seeds=(0,))
    found = {run.label: run.settings for run in runs(of)}
    assert found["MOELoRA on bundled-choice, seed 0"]["num_experts"] == 6
    # Runs along an axis use the paper's eight experts, because k = 7 of 6 is impossible.
    assert found["MOELoRA, k = 7 on bundled-choice, seed 0"]["num_experts"] == 8


def test_halves_of_the_blocks() -> None:
    fifth = runs(grid(sections=["table5"], seeds=(0,), tasks=TASKS[:1]))[-1]
    assert fifth.settings["router_activation"] == "gelu|relu"
    assert activations_by_block("gelu|relu", 4) == ["gelu", "gelu", "relu", "relu"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_found_again(name: str) -> None:
    run = runs(grid(sections=["table1"], only_methods=[name], seeds=(0,)))[0]
    made = {**run.says, "settings": _settings(run)}
    assert key_of(json.loads(json.dumps(made))) == run.key, "a record with all defaults answers"
