import pytest
from support.grids import TASKS, grid, record

from milora.paper.grid import Grid
from milora.paper.runs import Run
from milora.paper.store import Results
from milora.tuners.milora.config import activations_by_block
from milora_core.errors import MiLoraError

NOTHING = Results()


def runs(of: Grid, results: Results = NOTHING, settled: object = None) -> list[Run]:
    return of.runs(results, settled or (lambda digest: digest in results.finished))  # type: ignore[arg-type]


def finished(made: list[Run], **values: object) -> Results:
    return Results({run.digest: record(run, **values) for run in made})  # type: ignore[arg-type]


def test_runs_counted_by_hand() -> None:
    # 13 methods, 2 tasks, 2 seeds.
    assert len(runs(grid(sections=["table1"]))) == 13 * 2 * 2
    # Single-task runs of four methods are Table 1's; on top come one for both tasks each.
    assert len(runs(grid(sections=["table1", "table2"]))) == 52 + 4 * 2
    assert len(runs(grid(sections=["table2"]))) == 4 * 2 * 2 + 4 * 2
    # Figure 2 asks for nothing new.
    assert len(runs(grid(sections=["table1", "figure2"]))) == 52
    # k in 1..7 for two methods; MiLoRA's k = 3 and MOELoRA's k = 4 are Table 1's at the paper's settings.
    assert len(runs(grid(sections=["figure3"]))) == 14 * 4
    assert len(runs(grid(sections=["table1", "figure3"]))) == 52 + 12 * 4
    # Five coefficients, of which 0.01 is the default; six ranks for two methods, of which 32 is.
    assert len(runs(grid(sections=["table1", "figure4"]))) == 52 + 4 * 4
    assert len(runs(grid(sections=["table1", "figure5"]))) == 52 + 10 * 4
    assert len(runs(grid(sections=["table1", "table5"]))) == 52 + 5 * 4
    assert len(runs(grid(sections=["table1", "router-choices"]))) == 52 + 8 * 4
    whole = ["table1", "table2", "figure2", "figure3", "figure4", "figure5", "table5", "router-choices"]
    # The hard gate on normalised tokens is shared too; k = 3, lambda = 0.01 and r = 32 are one and the same run.
    assert len(runs(grid(sections=whole))) == 52 + 8 + 48 + 16 + 40 + 20 + 32


def test_the_paper_s_tasks_where_none_or_some_of_them_are_named() -> None:
    of = grid(sections=["table1", "table2", "figure3"], tasks=())
    columns = {section.name: section.columns for section in of.sections}
    assert columns["table1"] == ("arc-easy", "arc-challenge", "boolq", "obqa", "piqa", "aqua", "gsm8k")
    assert columns["table2"] == ("arc-easy", "arc-challenge", "boolq", "obqa", "piqa")
    assert columns["figure3"] == ("boolq", "piqa")
    of = grid(sections=["table1", "figure3"], tasks=("boolq", "gsm8k"))
    assert [section.columns for section in of.sections] == [("boolq", "gsm8k"), ("boolq",)]
    assert [section.columns for section in grid(sections=["table1", "figure3"]).sections] == [TASKS, TASKS]


def test_limits_and_methods() -> None:
    limits = {"figure3": {"tasks": ["boolq"], "seeds": [5], "values": [1, 2]}}
    found = runs(grid(sections=["figure3"], only_methods=["milora"], limits=limits))
    assert [(run.settings["top_k"], run.tasks, run.seed) for run in found] == [(1, ("boolq",), 5), (2, ("boolq",), 5)]


def test_a_digest_changes_with_everything_that_decides_the_outcome_and_with_nothing_else() -> None:
    def first(**flags: object) -> Run:
        return runs(grid(**{"sections": ["table1"], "only_methods": ["milora"], "seeds": (0,), **flags}))[0]

    base = first()
    assert first(sections=["figure2"]).digest == base.digest
    assert first(training={"learning_rate": 1e-4}).digest == base.digest, "the paper's rate, said or not"
    assert first(methods={"milora": {"gate": "hard"}}).digest == base.digest, "the default, said or not"
    others = [
        first(seeds=(1,)),
        first(tasks=TASKS[::-1]),
        first(training={"learning_rate": 1e-3}),
        first(data={"train_rows": 5}),
        first(evaluation={"beams": 1}),
        first(methods={"milora": {"gate": "softmax"}}),
        first(backbone="other"),
        first(only_methods=["midora"]),
    ]
    assert len({run.digest for run in (base, *others)}) == 1 + len(others)


def test_tries_come_first_and_the_best_is_used_for_all_seeds() -> None:
    of = grid(
        sections=["table1", "figure4"], only_methods=["milora"], tasks=TASKS[:1], tune={"learning_rate": [1, 2, 3]}
    )
    tries = runs(of)
    assert [(run.seed, run.training["learning_rate"]) for run in tries] == [(0, 1), (0, 2), (0, 3)]
    perplexity = {1: 3.0, 2: 1.5, 3: None}
    results = Results(
        {run.digest: record(run, dev_perplexity=perplexity[run.training["learning_rate"]]) for run in tries}
    )
    after = runs(of, results)
    # The second seed, and four other coefficients with two seeds; the first seed is one of the tries.
    assert len(after) == 3 + 1 + 4 * 2
    assert {run.training["learning_rate"] for run in after if run not in tries} == {2}
    choice = of.choice(of.cells()[0], results, lambda digest: True)
    assert choice.best == {"learning_rate": 2}
    assert [merit for _, merit in choice.tried] == [3.0, 1.5, float("inf")]


def test_nothing_is_chosen_while_a_try_may_still_come_and_failed_ones_are_passed_over() -> None:
    of = grid(sections=["table1"], only_methods=["lora"], tasks=TASKS[:1], tune={"learning_rate": [1, 2]})
    first, second = runs(of)
    results = finished([second])
    assert runs(of, results) == [first, second]
    assert len(of.awaited(of.cells(), results, lambda digest: digest in results.finished)) == 1
    # The other has failed for this time.
    after = runs(of, results, lambda digest: True)
    assert [run.training["learning_rate"] for run in after] == [1, 2, 2]
    assert not of.awaited(of.cells(), results, lambda digest: True)


def test_a_try_that_diverged_is_never_the_best() -> None:
    made = grid(sections=["table1"], tasks=TASKS[:1], only_methods=["lora"], tune={"learning_rate": [1e-3, 1e-2, 1e-1]})
    cell = made.cells()[0]
    perplexity = {1e-3: float("nan"), 1e-2: 5.0, 1e-1: float("inf")}
    finished = {
        run.digest: record(run, dev_perplexity=perplexity[value["learning_rate"]])
        for value, run in made.candidates(cell)
    }
    assert made.choice(cell, Results(finished), lambda digest: True).best == {"learning_rate": 1e-2}


def test_tuning_by_accuracy_on_dev() -> None:
    flags = {"tune": {"learning_rate": [1, 2]}, "tune_by": "accuracy", "evaluation": {"dev_rows": 4}}
    of = grid(sections=["table2"], only_methods=["lora"], **flags)
    cell = next(cell for cell in of.cells() if len(cell.tasks) == 2)
    tries = [run for _, run in of.candidates(cell)]
    dev = {1: [0.9, 0.2], 2: [0.6, 0.6]}
    results = Results(
        {
            run.digest: record(
                run, dev={t: {"accuracy": a} for t, a in zip(TASKS, dev[run.training["learning_rate"]], strict=True)}
            )
            for run in tries
        }
    )
    assert of.choice(cell, results, lambda digest: True).best == {"learning_rate": 2}


def test_gates_are_tuned_one_by_one() -> None:
    of = grid(
        sections=["table1", "router-choices"], only_methods=["milora"], tasks=TASKS[:1], tune={"learning_rate": [1, 2]}
    )
    tries = runs(of)
    assert len(tries) == 9 * 2
    assert {(run.settings["gate"], run.settings["router_norm"]) for run in tries} == {
        (gate, norm) for gate in ("hard", "softmax", "renormalized") for norm in ("tokens", "pooled", "none")
    }


@pytest.mark.parametrize("tune", [{}, {"learning_rate": [1, 2]}])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_cover_the_grid_and_do_not_overlap(tune: dict[str, list[float]], count: int) -> None:
    of = grid(sections=["table1", "table2", "figure3", "figure4", "router-choices"], tune=tune)
    everything = {run.digest for run in runs(of)}
    results = finished(runs(of)) if tune else NOTHING
    everything |= {run.digest for run in runs(of, results)}
    shares = [
        {run.digest for run in of.runs(results, lambda digest: True, of.shard(index, count))}
        for index in range(1, count + 1)
    ]
    assert set().union(*shares) == everything
    assert sum(map(len, shares)) == len(everything), "no run is in two shards"
    assert max(map(len, shares)) <= 1.2 * len(everything) / count
    with pytest.raises(MiLoraError, match="from 1 to n"):
        of.shard(count + 1, count)


def test_what_cannot_be_run_is_named_and_the_rest_is_run() -> None:
    missing = {"mmlu": "no folder mmlu", "llama-2-13b": "no weights", "alpaca": "no file"}
    of = grid(missing, sections=["table3", "table7", "table1"], tasks=())
    assert len(runs(of)) == 13 * 7 * 2 + 2 * 2 * 2, "Table 1, and Table 7's BoolQ and PIQA on Gemma"
    by_name = {section.name: section for section in of.sections}
    table3 = by_name["table3"].rows[0].cells
    assert of.missing(table3["bbh"][0], "bbh") == "no file"
    table7 = by_name["table7"].rows[0].cells
    assert of.missing(table7["boolq"][0], "boolq") == "no weights"
    # With Alpaca there, only what a test lacks itself is left out.
    of = grid({"mmlu": "no folder mmlu"}, sections=["table3"], tasks=())
    # MT-Bench has what MiLoRA's routers choose.
    assert {run.method: run.tests for run in runs(of)} == {"moelora": ("bbh",), "milora": ("mt-bench", "bbh")}
    cells = of.sections[0].rows[0].cells
    assert of.missing(cells["bbh"][0], "bbh") is None
    assert of.missing(cells["mmlu"][0], "mmlu") == "no folder mmlu"
    assert "judge" in str(of.missing(cells["mt-bench"][0], "mt-bench"))


URL = "http://127.0.0.1:9/v1"
NOT_AT_HAND = {"mmlu": "no folder mmlu", "bbh": "no folder bbh"}


def test_figure_2_needs_no_judge_for_mt_bench() -> None:
    of = grid(NOT_AT_HAND, sections=["figure2"], tasks=(), seeds=(0,))
    found = {run.tasks: run for run in runs(of)}
    assert found[("alpaca",)].tests == ("mt-bench",)
    assert "judge" not in found[("alpaca",)].evaluation
    assert of.missing(of.sections[0].rows[0].cells["mt-bench"][0], "mt-bench") is None
    # Table 3 has nothing to show of such a run, which is made where figure 2 is there, and is then the same.
    assert runs(grid(NOT_AT_HAND, sections=["table3"], tasks=(), seeds=(0,))) == []
    both = runs(grid(NOT_AT_HAND, sections=["table3", "figure2", "figure4"], tasks=(), seeds=(0,)))
    assert [run for run in both if run.tasks == ("alpaca",)] == [found[("alpaca",)]]
    without = grid({"mt-bench": "no folder mt_bench"}, sections=["figure2"], tasks=(), seeds=(0,))
    cell = without.sections[0].rows[0].cells["mt-bench"][0]
    assert without.missing(cell, "mt-bench") == "no folder mt_bench"


def test_with_a_judge_table_3_has_mt_bench_and_its_runs_are_others() -> None:
    settings = {"sections": ["table3"], "tasks": (), "seeds": (0,)}
    of = grid(NOT_AT_HAND, judge_url=URL, judge_model="j", **settings)
    found = {run.method: run for run in runs(of)}
    assert {run.tests for run in found.values()} == {("mt-bench",)}
    assert found["milora"].evaluation["judge"] == "j"
    assert of.missing(of.sections[0].rows[0].cells["mt-bench"][0], "mt-bench") is None
    # The judge decides the outcome, and the place where it is reached does not.
    elsewhere = runs(grid(NOT_AT_HAND, judge_url="https://example.com", judge_model="j", **settings))
    other = runs(grid(NOT_AT_HAND, judge_url=URL, judge_model="k", **settings))
    digests = {run.digest for run in found.values()}
    assert {run.digest for run in elsewhere} == digests
    assert not {run.digest for run in other} & digests
    # Runs that hold no conversations are the same with a judge.
    single = {"sections": ["table1"], "only_methods": ["milora"]}
    assert runs(grid(judge_url=URL, **single)) == runs(grid(**single))


def test_conversations_are_held_for_table_3_and_not_for_each_ablation() -> None:
    of = grid(sections=["table3", "table5", "table7"], tasks=(), seeds=(0,), judge_url=URL)
    alpaca = [run for run in runs(of) if run.tasks == ("alpaca",)]
    # Table 5's first row is Table 3's MiLoRA; five ablations, and two methods on two other backbones.
    assert [run.tests for run in alpaca] == [("mt-bench", "mmlu", "bbh")] * 2 + [("mmlu", "bbh")] * (5 + 4)


def test_instructions_are_tuned_by_perplexity_where_all_else_is_tuned_by_accuracy() -> None:
    flags = {"tune": {"learning_rate": [1, 2]}, "tune_by": "accuracy", "evaluation": {"dev_rows": 4}}
    of = grid(sections=["table3"], only_methods=["milora"], tasks=(), **flags)
    cell = of.cells()[0]
    perplexity = {1: 3.0, 2: 2.0}
    results = Results(
        {
            run.digest: record(run, dev={"alpaca": {"perplexity": perplexity[value["learning_rate"]], "rows": 4}})
            for value, run in of.candidates(cell)
        }
    )
    choice = of.choice(cell, results, lambda digest: True)
    assert (choice.best, choice.criterion) == ({"learning_rate": 2}, "perplexity")
    other = grid(sections=["table1"], only_methods=["milora"], **flags)
    assert other.choice(other.cells()[0], Results(), lambda digest: True).criterion == "accuracy"


def test_budgets_reach_the_runs() -> None:
    of = grid(sections=["table1", "figure3"], only_methods=["moelora"], budget="milora", tasks=TASKS[:1], seeds=(0,))
    found = {run.label: run.settings for run in runs(of)}
    assert found["MOELoRA on bundled-choice, seed 0"]["num_experts"] == 6
    # Along an axis it is the paper's eight, for 7 of 6 cannot be chosen.
    assert found["MOELoRA, k = 7 on bundled-choice, seed 0"]["num_experts"] == 8


def test_halves_of_the_blocks() -> None:
    of = grid(sections=["table5"], seeds=(0,), tasks=TASKS[:1])
    fifth = runs(of)[-1]
    assert fifth.settings["router_activation"] == "gelu|relu"
    assert activations_by_block("gelu|relu", 4) == ["gelu", "gelu", "relu", "relu"]
