"""Tables, paired tests and a picture from the records of `python -m reproduction.smollm2`.

    python -m reproduction.smollm2.report docs/results/smollm2

Reads those of `start.json`, `ablation.jsonl`, `table1.jsonl`, `gpu.jsonl`, `gsm8k.jsonl`, `t0.jsonl` and `decode.json`
(`milora bench decode --json`) that exist. Writes `tables.md`, and `cost.png` if a method has both a result and a decode
cost.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from milora.markdown import markdown_table
from milora_core.files import write_text
from reproduction.smollm2.comparing import bootstrap, mcnemar

Record = dict[str, Any]

OURS = "milora"
"""The name of the runs that the others are compared with."""

DECODE_NAMES = {
    "dora": "dora-cached",
    "milora, k = 1": "milora-k1",
    "milora, k = 2": "milora-k2",
    "milora, dense for 15 steps": "milora",
    "milora, dense for 30 steps": "milora",
    "milora, four experts": "milora-qvod",
    "lora, three modules, r = 16": "lora-qvd",
}
"""Names in `milora bench decode` that differ."""


def read(file: Path) -> list[Record]:
    """The records of a file; empty if it is missing."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`0.41 (0.40 to 0.43)`: median, minimum and maximum over seeds."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def start_table(study: dict[str, Any]) -> str:
    """Routers before training, medians over seeds."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in study["rows"]:
        groups[row["router_norm"], row["pooler"], row["centred"]].append(row)
    names = ("by_ties", "entropy", "distinct_routes", "adjusted_mutual_information", "most_used_share")
    return markdown_table(
        ["router_norm", "pooler", "centred", "by ties", "entropy", "distinct routes", "AMI", "most used"],
        [
            [norm, pooler, "yes" if centred else "no", *(f"{median(row[name] for row in rows):.3g}" for name in names)]
            for (norm, pooler, centred), rows in groups.items()
        ],
    )


def ablation_table(records: Iterable[Record]) -> str:
    """One line per setting: dev loss and accuracy, and routes after training."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["name"]].append(record)
    lines = []
    for name, of_name in groups.items():
        dev = [record["dev"] for record in of_name]
        routes = [of["routes"] for of in dev if of["routes"]]
        lines.append(
            [
                name,
                str(len(of_name)),
                spread([math.exp(of["loss"]) for of in dev]),
                spread([of["accuracy"] for of in dev], 2),
                *_routes(routes, [record["before"]["routes"] for record in of_name if record["before"]]),
                _gradients(of_name),
            ]
        )
    header = [
        "setting", "seeds", "dev perplexity", "dev accuracy", "distinct routes: start, end", "AMI: start, end",
        "most used", "by ties", "gradient of W_r: blocks 0, 15, 29",
    ]  # fmt: skip
    return markdown_table(header, lines)


def _routes(end: Sequence[Record], start: Sequence[Record]) -> list[str]:
    if not end:
        return ["-"] * 4
    return [
        ", ".join(spread([of["distinct_routes"] for of in when], 0) for when in (start, end)),
        ", ".join(spread([of["adjusted_mutual_information"] for of in when], 2) for when in (start, end)),
        spread([of["most_used_share"] for of in end], 2),
        spread([of["by_ties"] for of in end], 2),
    ]


def _gradients(records: Sequence[Record]) -> str:
    """Medians over the second half of the steps and the seeds."""
    steps = [step for record in records for step in record["router_gradients"][len(record["router_gradients"]) // 2 :]]
    steps = [step for step in steps if step]
    return ", ".join(f"{median(step[block] for step in steps):.0e}" for block in ("0", "15", "29")) if steps else "-"


def best_rates(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each method, one per seed, at the learning rate with the most seeds, then the lowest dev loss."""
    rates: dict[str, dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        rates[record["name"]][record["learning_rate"]].append(record)
    best = {}
    for name, of_name in rates.items():
        rate = min(of_name, key=lambda r: (-len(of_name[r]), mean(record["dev"]["loss"] for record in of_name[r])))
        best[name] = sorted(of_name[rate], key=lambda record: record["seed"])
    return best


def table1(best: dict[str, list[Record]]) -> str:
    """Test accuracy and answer loss by task, spread over seeds."""
    tasks = list(next(iter(best.values()))[0]["test"]["tasks"])
    return markdown_table(
        [
            *("method", "tunable", "learning rate", "seeds"),
            *(f"{task}: {measure}" for task in tasks for measure in ("accuracy", "answer loss")),
            *("mean accuracy", "dev perplexity"),
        ],
        [
            [
                name,
                f"{of[0]['tunable'] / 1e6:.2f}M",
                f"{of[0]['learning_rate']:g}",
                str(len(of)),
                *(
                    spread(values)
                    for results in ([record["test"]["tasks"][task] for record in of] for task in tasks)
                    for values in (
                        [result["accuracy"] for result in results],
                        [mean(result["answer_losses"]) for result in results],
                    )
                ),
                spread([record["test"]["accuracy"] for record in of]),
                spread([math.exp(record["dev"]["loss"]) for record in of]),
            ]
            for name, of in best.items()
        ],
    )


def comparisons(best: dict[str, list[Record]]) -> str:
    """MiLoRA against every other method on the same test rows."""
    lines = []
    for name, of in best.items():
        if name == OURS:
            continue
        seeds = sorted({record["seed"] for record in of} & {record["seed"] for record in best[OURS]})
        for task in best[OURS][0]["test"]["tasks"]:
            a, b = ([r["test"]["tasks"][task] for r in records if r["seed"] in seeds] for records in (best[OURS], of))
            if not a:
                continue
            accuracy = bootstrap(_each(a, "right"), _each(b, "right"))
            loss = bootstrap(_each(a, "answer_losses"), _each(b, "answer_losses"))
            p_values = ", ".join(f"{mcnemar(x['right'], y['right']):.2g}" for x, y in zip(a, b, strict=True))
            intervals = (f"{middle:+.3f} ({low:+.3f} to {high:+.3f})" for middle, low, high in (accuracy, loss))
            lines.append([task, name, str(len(seeds)), *intervals, p_values])
    header = ["task", f"{OURS} against", "seeds", "difference in accuracy", "difference in answer loss", "McNemar's p"]
    return markdown_table(header, lines)


def _each(results: Iterable[Record], measure: str) -> list[list[float]]:
    """(seeds, rows). A string of 0 and 1 says which rows were right."""
    return [[float(value) for value in result[measure]] for result in results]


def perplexity_table(best: dict[str, list[Record]]) -> str:
    """Perplexity of the test completions of a single task, and the difference of MiLoRA's loss on the same rows."""
    (task,) = next(iter(best.values()))[0]["test"]["tasks"]
    lines = []
    for name, of in best.items():
        seeds = {record["seed"] for record in of} & {record["seed"] for record in best[OURS]}
        a, b = (
            [r["test"]["tasks"][task]["completion_losses"] for r in records if r["seed"] in seeds]
            for records in (best[OURS], of)
        )
        difference = "{:+.4f} ({:+.4f} to {:+.4f})".format(*bootstrap(a, b)) if name != OURS and seeds else "-"
        lines.append(
            [
                name,
                f"{of[0]['tunable'] / 1e6:.2f}M",
                f"{of[0]['learning_rate']:g}",
                str(len(of)),
                spread([perplexity_of(record) for record in of]),
                difference,
            ]
        )
    header = ["method", "tunable", "learning rate", "seeds", f"{task}: test perplexity", f"loss of {OURS} - its loss"]
    return markdown_table(header, lines)


def perplexity_of(record: Record) -> float:
    """The perplexity of all tokens of the test completions."""
    return math.exp(record["test"]["loss"])


def routes_table(best: dict[str, list[Record]]) -> str:
    """The routes of the test prompts, for the methods that have routers."""
    lines = []
    for name, of in best.items():
        routes = [record["test"]["routes"] for record in of if record["test"]["routes"]]
        if routes:
            distinct = spread([of_seed["distinct_routes"] for of_seed in routes], 0)
            names = ("adjusted_mutual_information", "most_used_share")
            shares = (spread([of_seed[measure] for of_seed in routes], 2) for measure in names)
            lines.append([name, f"{distinct} of {routes[0]['prompts']}", *shares])
    return markdown_table(["method", "distinct routes", "AMI of route and task", "most used expert"], lines)


def decode_speeds(names: Iterable[str], decode: dict[str, Any]) -> dict[str, float]:
    """Method -> decode speed as a share of the backbone's at beam 1, for the measured ones."""
    speeds = {row["method"]: float(row["ratio_to_base"]) for row in decode["rows"] if row["beam"] == 1}
    found = {name: DECODE_NAMES.get(name, name) for name in names}
    return {name: speeds[of] for name, of in found.items() if of in speeds}


def draw(speeds: dict[str, float], results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draws results against decode speed, one panel for each measure. Bars show the minimum and maximum over seeds.

    Args:
        speeds: Method -> decode speed as a share of the backbone's.
        results: Measure -> method -> one value for each seed.
        path: The image file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    colors = {name: f"C{place}" for place, name in enumerate(speeds)}
    for axes, (measure, of_methods) in zip(panels, results.items(), strict=True):
        for name, values in of_methods.items():
            middle = median(values)
            errors = [[middle - min(values)], [max(values) - middle]]
            # Methods with routers are diamonds.
            form = "D" if name.startswith("mi") else "o"
            axes.errorbar(speeds[name], middle, yerr=errors, fmt=form, color=colors[name], label=name)
        axes.margins(0.15)
        axes.set_xlabel("decode speed, share of the backbone's")
        axes.set_ylabel(measure)
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


def write(folder: Path) -> None:
    """Writes the tables for which the folder has records."""
    parts = []
    if (folder / "start.json").is_file():
        parts += ["## Routers before training", start_table(json.loads((folder / "start.json").read_text()))]
    if ablation := read(folder / "ablation.jsonl"):
        parts += ["## Router ablation", ablation_table(ablation)]
    answers = {
        title: best_rates(record for record in read(folder / file) if "test" in record)
        for title, file in {"Table 1": "table1.jsonl", "Table 1 on a GPU": "gpu.jsonl"}.items()
    }
    for title, best in answers.items():
        if best:
            parts += [f"## {title}", table1(best), f"## {title}: routes of the test prompts", routes_table(best)]
        if OURS in best and len(best) > 1:
            parts += [f"## {title}: paired tests", comparisons(best)]
    texts = {
        title: best_rates(read(folder / file)) for title, file in {"GSM8K": "gsm8k.jsonl", "T0": "t0.jsonl"}.items()
    }
    for title, best in texts.items():
        if OURS in best:
            parts += [f"## {title}", perplexity_table(best)]
    if (folder / "decode.json").is_file():
        methods = {name: None for best in (*answers.values(), *texts.values()) for name in best}
        speeds = decode_speeds(methods, json.loads((folder / "decode.json").read_text()))
        results = {
            f"{title}: test perplexity, lower is better": {
                name: [perplexity_of(record) for record in best[name]] for name in speeds if name in best
            }
            for title, best in texts.items()
        }
        results["ARC-Easy and BoolQ: test accuracy"] = {
            name: [record["test"]["accuracy"] for record in answers["Table 1"][name]]
            for name in speeds
            if name in answers["Table 1"]
        }
        results = {measure: of_methods for measure, of_methods in results.items() if of_methods}
        if results:
            draw(speeds, results, folder / "cost.png")
            header = ["method", "speed / base", *results]
            lines = [
                [name, f"{speed:.3f}", *(spread(of[name]) if name in of else "-" for of in results.values())]
                for name, speed in speeds.items()
            ]
            parts += ["## Results against decode cost", markdown_table(header, lines)]
    write_text(folder / "tables.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
