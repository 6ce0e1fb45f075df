"""The experiments on SmolLM2: runs that are shared, counting of routes, comparison of methods."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.adapted import adapted
from trl.trainer.utils import add_fused_lm_head

from milora.tuners.milora.router import routers_of
from reproduction.smollm2 import __main__ as runner
from reproduction.smollm2 import report, trial
from reproduction.smollm2.comparing import bootstrap, mcnemar
from reproduction.smollm2.report import read
from reproduction.smollm2.routing import Centred, route_statistics
from reproduction.smollm2.t0 import t0_rows
from reproduction.smollm2.trial import Trial, batches, collate

SETTINGS = sorted(Path(runner.__file__).parent.glob("*.yaml"))


def test_mcnemar_is_the_binomial_test_by_hand() -> None:
    # Only the first got eight rows right, only the second got two: 2 * sum_{i<=2} C(10, i) / 2^10.
    assert mcnemar("1" * 8 + "0" * 2 + "1" * 5, "0" * 8 + "1" * 2 + "1" * 5) == pytest.approx(2 * 56 / 1024)
    assert mcnemar("0110", "0110") == 1.0


def test_the_bootstrap_pairs_rows() -> None:
    # Both are wrong on the same half of the rows, and the first is right on one row in four that the second is not.
    first, second = [1.0, 1.0, 1.0, 0.0] * 100, [1.0, 0.0, 1.0, 0.0] * 100

    difference, low, high = bootstrap([first], [second])

    assert difference == pytest.approx(0.25)
    # The standard error of the paired difference is sqrt(0.25 * 0.75 / 400) = 0.022.
    assert low == pytest.approx(0.25 - 1.96 * 0.0217, abs=0.006)
    assert high == pytest.approx(0.25 + 1.96 * 0.0217, abs=0.006)


def _decisions(sets: list[list[int]], experts: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.zeros(len(sets), 1, experts, dtype=torch.bool)
    for row, places in enumerate(sets):
        chosen[row, 0, places] = True
    return torch.where(chosen, 0.45, 0.05), chosen


def test_routes_by_task_and_blind_routes_differ_in_mutual_information() -> None:
    by_task = [_decisions([[0, 1]] * 6), _decisions([[2, 3]] * 6)]
    blind = [_decisions([[0, 1]] * 6), _decisions([[0, 1]] * 6)]

    seeing = route_statistics(*zip(*by_task, strict=True))
    same = route_statistics(*zip(*blind, strict=True))

    assert seeing["adjusted_mutual_information"] == pytest.approx(1.0)
    assert (seeing["distinct_routes"], same["distinct_routes"]) == (2, 1)
    assert same["normalized_mutual_information"] == pytest.approx(0.0)
    assert (seeing["most_used_share"], same["most_used_share"]) == (0.25, 0.5)
    assert seeing["share_difference_by_task"] == 1.0


def test_a_centred_router_sees_what_differs() -> None:
    shared = 100 * torch.ones(8)
    centred = Centred().train()
    batch = shared + torch.randn(64, 8)
    centred(batch)

    out = centred.eval()(batch)

    assert out.mean(dim=0).abs().max() < 1e-4
    assert out.square().mean().sqrt() == pytest.approx(1.0, abs=0.01)


def test_batches_are_the_seeds_alone_and_have_as_many_rows_of_each_task() -> None:
    rows: dict[str, Any] = {"a": list("abcdefgh"), "b": list("ABCDEFGH")}

    first, again, other = (list(batches(rows, Trial(seed=seed, steps=5, batch=4))) for seed in (1, 1, 2))

    assert first == again != other
    assert all(sum(row.islower() for row in batch) == 2 for batch in first)
    assert len({row for batch in first[:4] for row in batch}) == 16


def test_rows_of_t0_with_one_completion_are_in_one_split(tmp_path: Path) -> None:
    (tmp_path / "t0").mkdir()
    rows = [
        {"prompt": f"Prompt {wording} of {number}", "completion": f"This is the long completion {number}"}
        for number in range(300)
        for wording in "ab"
    ]
    rows += [rows[0], {"prompt": "Yes or no?", "completion": "yes"}]
    with gzip.open(tmp_path / "t0" / "pretrain.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    splits = {split: t0_rows(split, str(tmp_path)) for split in ("train", "dev", "test")}
    completions = {split: {row.completion for row in of} for split, of in splits.items()}

    assert [len(of) for of in splits.values()] == [2 * len(of) for of in completions.values()]
    assert sum(len(of) for of in completions.values()) == len(set.union(*completions.values())) == 300
    assert 0 < len(completions["dev"]) < len(completions["test"]) < len(completions["train"]) / 4
    # The rows are not in the file's order, which groups tasks.
    assert splits["train"] == t0_rows("train", str(tmp_path)) != sorted(splits["train"], key=lambda row: row.prompt)


def test_labels_are_the_completion() -> None:
    example = trial.Example("boolq", [5, 6, 7, 8], 2, 3, [1, 2], 0)
    longer = trial.Example("boolq", [5, 6, 7, 8, 9], 4, 4, [1, 2], 0)

    batch = collate([example, longer], pad=0)

    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100], [-100] * 4 + [9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.stem)
def test_settings_files_name_runs_that_differ(file: Path) -> None:
    runs = [value for _, values in runner.entries_of(yaml.safe_load(file.read_text())) for value in values]

    assert len({runner.identity(value, "backbone") for value in runs}) == len(runs)


def test_with_gradients_to_all_the_output_is_the_same_and_unchosen_experts_are_judged() -> None:
    model = adapted("llama").model
    example = trial.Example("gsm8k", [5, 6, 7, 8], 2, 0, [], -1)
    batch = collate([example, trial.Example("gsm8k", [9, 3, 4, 8], 2, 0, [], -1)], pad=0)
    # The last block's: gradients of earlier ones pass through later routers, which change.
    router = list(routers_of(model).values())[-1]
    weight = model.get_base_model().model.layers[-1].self_attn.q_proj.lora_B["default"].weight
    found = []
    for value in (Trial(), Trial(gradient_to_all=True)):
        trial.prepare_routers(model, value)
        model.zero_grad()
        decide, gates = router.decide, []

        def recording(*args: Any, decide: Any = decide, gates: list[torch.Tensor] = gates) -> Any:
            decision = decide(*args)
            decision.gates.retain_grad()
            gates.append(decision.gates)
            return decision

        router.decide = recording  # type: ignore[method-assign, assignment]
        loss = model(**batch).loss
        loss.backward()
        router.decide = decide  # type: ignore[method-assign]
        found.append((loss.item(), weight.grad.clone(), gates[0]))

    (first_loss, first_gradient, first), (all_loss, all_gradient, of_all) = found
    assert all_loss == pytest.approx(first_loss, abs=1e-6)
    torch.testing.assert_close(all_gradient, first_gradient)
    assert torch.equal(first, of_all)
    # An expert with a gate of 0 gets the derivative of the loss to its gate.
    assert first.grad is not None
    assert of_all.grad is not None
    unchosen = of_all.detach() == 0
    assert (first.grad[unchosen] == 0).all()
    assert (of_all.grad[unchosen] != 0).all()
    torch.testing.assert_close(of_all.grad[~unchosen], first.grad[~unchosen])


@pytest.mark.parametrize("file", ["ablation", "gsm8k", "table1"])
def test_records_keep_their_identity(file: str) -> None:
    records = read(Path(__file__).parents[2] / "docs/results/smollm2" / f"{file}.jsonl")
    names = {field.name for field in fields(Trial)}

    for record in records:
        value = Trial(**{name: of for name, of in record.items() if name in names} | {"tasks": tuple(record["tasks"])})
        assert runner.identity(value, record["backbone"]) == record["run"]


def test_dense_steps_train_all_experts_first() -> None:
    model = adapted("llama").model
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "is_top1"))
    chosen: list[int] = []
    router = next(iter(routers_of(model).values()))
    decide = router.decide
    router.decide = lambda *args: chosen.append(decided := decide(*args)) or decided  # type: ignore
    rows = {"gsm8k": [trial.Example("gsm8k", [5, 6, 7, 8], 2, 0, [], -1)] * 8}

    trial.train(model, Trial(tasks=("gsm8k",), steps=5, batch=4, dense_steps=2), rows, pad=0)

    assert [int(each.chosen.sum()) // 4 for each in chosen] == [7, 7, 2, 2, 2]


@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_router_sends_no_gradient_below(detached: bool) -> None:
    model = adapted("llama").model
    trial.prepare_routers(model, Trial(detach_router_input=detached))
    *_, router = routers_of(model).values()
    hidden = torch.randn(2, 5, router.hidden_size, requires_grad=True)
    decision = router.decide("default", hidden, torch.ones(2, 5, dtype=torch.bool))
    decision.probabilities[:, 0].sum().backward()
    assert (hidden.grad is None) is detached
    assert trial.router_weight(router).grad is not None


def test_the_first_seed_chooses_the_learning_rate_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    settings = tmp_path / "settings.yaml"
    entry = {"name": "one", "seeds": [0, 1], "learning_rates": [0.1, 0.2, 0.3]}
    settings.write_text(yaml.safe_dump({"runs": [entry]}))
    made: list[tuple[int, float]] = []

    def run(value: Trial, backbone: str, data: str, device: str) -> dict[str, Any]:
        made.append((value.seed, value.learning_rate))
        return {"dev": {"loss": abs(value.learning_rate - 0.2)}}

    monkeypatch.setattr(runner, "run", run)
    arguments = [str(settings), "--backbone", str(tmp_path), "--records", str(tmp_path / "r.jsonl"), "--revision", "a"]
    monkeypatch.setattr(sys, "argv", ["smollm2", *arguments, "--list"])
    runner.main()
    assert capsys.readouterr().out.count("waiting") == 3
    monkeypatch.setattr(sys, "argv", ["smollm2", *arguments])
    runner.main()

    assert made == [(0, 0.1), (0, 0.2), (0, 0.3), (1, 0.2)]


def test_a_finished_run_is_not_repeated_and_an_interrupted_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"runs": [{"name": "one", "seeds": [0, 1]}]}))
    made: list[int] = []

    def run(value: Trial, backbone: str, data: str, device: str) -> dict[str, Any]:
        made.append(value.seed)
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"dev": {"loss": 1.0}}

    monkeypatch.setattr(runner, "run", run)
    records = tmp_path / "records.jsonl"
    arguments = [str(settings), "--backbone", str(tmp_path), "--records", str(records), "--revision", "abc"]
    monkeypatch.setattr(sys, "argv", ["smollm2", *arguments])
    with pytest.raises(KeyboardInterrupt):
        runner.main()
    runner.main()
    runner.main()

    assert made == [0, 1, 1]
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["revision"] == "abc"
    assert "finished" in capsys.readouterr().out


def _record(name: str, seed: int, rate: float, right: str, dev: float) -> dict[str, Any]:
    losses = [0.1 if char == "1" else 2.1 for char in right]
    accuracy = right.count("1") / len(right)
    routes = {"distinct_routes": 7, "adjusted_mutual_information": 0.5, "most_used_share": 0.2, "prompts": 9}
    tasks = {"boolq": {"rows": len(right), "accuracy": accuracy, "right": right, "answer_losses": losses}}
    return {
        "name": name,
        "seed": seed,
        "learning_rate": rate,
        "tunable": 1_000_000,
        "dev": {"loss": dev, "accuracy": 0.5},
        "test": {"tasks": tasks, "accuracy": accuracy, "routes": routes if name == "milora" else None},
    }


def test_the_report_takes_each_methods_best_rate_on_dev_and_draws_the_cost(tmp_path: Path) -> None:
    records = [
        _record("milora", 0, 1e-3, "1110", 0.2),
        _record("milora", 0, 1e-2, "0000", 0.9),
        _record("lora", 0, 1e-3, "1010", 0.3),
    ]
    (tmp_path / "table1.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [{"method": name, "beam": 1, "ratio_to_base": speed} for name, speed in (("milora", 0.95), ("lora", 0.8))]
    (tmp_path / "decode.json").write_text(json.dumps({"rows": rows}))

    best = report.best_rates(records)
    assert [record["learning_rate"] for record in best["milora"]] == [1e-3]
    report.write(tmp_path)

    text = (tmp_path / "tables.md").read_text()
    assert "+0.250 (" in text
    assert "-0.500 (" in text
    assert "7 of 9" in text
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_the_report_compares_perplexity_on_the_same_rows(tmp_path: Path) -> None:
    def record(name: str, seed: int, losses: list[float]) -> dict[str, Any]:
        loss = sum(losses) / len(losses)
        test = {"tasks": {"gsm8k": {"rows": 4, "completion_losses": losses}}, "loss": loss}
        common = {"name": name, "seed": seed, "learning_rate": 1e-3, "tunable": 2_000_000, "dev": {"loss": loss}}
        return {**common, "test": test}

    records = [
        record("milora", 0, [1.0, 1.0, 1.2, 0.8]),
        record("milora", 1, [1.2, 1.0, 1.2, 0.6]),
        record("lora", 0, [0.9, 0.9, 1.1, 0.7]),  # 0.1 lower in each row, so the interval has no width.
    ]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    speeds = {"milora": 0.95, "milora-k1": 0.97, "lora": 0.8}
    rows = [{"method": name, "beam": 1, "ratio_to_base": speed} for name, speed in speeds.items()]
    (tmp_path / "decode.json").write_text(json.dumps({"rows": rows}))

    report.write(tmp_path)

    text = (tmp_path / "tables.md").read_text()
    assert "2.718 (2.718 to 2.718)" in text  # e^1 with both seeds.
    assert "+0.1000 (+0.1000 to +0.1000)" in text
    assert "0.800" in text
    assert (tmp_path / "cost.png").stat().st_size > 1000


STUB = """#!/usr/bin/env bash
# Stands in for Python: a run of a settings file takes a second and makes one of its two runs.
[ "$2" = reproduction.smollm2.report ] && { echo "report $3"; exit; }
while [ $# -gt 0 ]; do [ "$1" = --records ] && records=$2; list=$1; shift; done
count=$(cat "$records" 2>/dev/null | wc -l)
if [ "$list" = --list ]; then
  for number in 1 2; do [ "$number" -le "$count" ] && echo "finished $number" || echo "missing  $number"; done
  exit
fi
sleep "${STUB_SECONDS:-0.2}"
[ "$count" -ge 2 ] || echo run >>"$records"
"""


@pytest.mark.parametrize(("budget", "expected"), [("60", "2 finished"), ("1", "2 missing")])
def test_the_gpu_script_continues_until_nothing_is_missing_or_time_is_up(
    tmp_path: Path, budget: str, expected: str
) -> None:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    settings = {"PYTHON": str(stub), "SETTINGS": "t0 gsm8k", "PROCESSES": "1", "BUDGET": budget, "REVISION": "a"}
    seconds = {"STUB_SECONDS": "30"} if budget == "1" else {}
    script = Path(__file__).parents[2] / "scripts" / "smollm2_gpu.sh"

    done = subprocess.run(
        ["bash", str(script), "model", "data", str(tmp_path / "results")],
        env={**os.environ, **settings, **seconds},
        capture_output=True,
        text=True,
        timeout=50,
    )

    assert done.stderr == ""
    assert done.stdout == f"t0: {expected}\ngsm8k: {expected}\nreport {tmp_path / 'results'}\n"
