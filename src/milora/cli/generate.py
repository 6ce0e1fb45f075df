"""`milora generate`: texts for prompts, with what share of them is right where the answers are known."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora.cli import options
from milora.cli.output import json_only, progress_bar, quiet_libraries
from milora.cli.prompts import Request, read_requests
from milora.errors import MiLoraError

if TYPE_CHECKING:
    from milora.inference.generation import Decoding, GeneratedText
    from milora.tasks.task import Task

DEFAULT_ADAPTER = "default"


def command(
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="[NAME=]DIR", help="Adapter; repeat as NAME=DIR for rows that name theirs."),
    ] = None,
    backbone: options.Backbone = None,
    prompt: options.Prompts = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help="A task, a .jsonl or .json file, a folder or a hub dataset."),
    ] = None,
    split: options.Split = "test",
    data_dir: options.DataDirectory = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Read answers as this task does; by default the task of --data."),
    ] = None,
    limit: options.Limit = None,
    beams: Annotated[
        int | None,
        typer.Option("--beams", min=1, help="Beams; 3 by default, as in the paper, and 1 when sampling."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="By default what the task needs, else 128."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Sample at this temperature."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from the tokens that make up this probability."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random numbers, when sampling.")] = 0,
    batch_size: options.BatchSize = 8,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE.jsonl", help="Append a row a prompt; what is there already is kept."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate texts with an adapter.

    Prompts come from --prompt, --data, or standard input (a line each). Without --output the texts are printed.
    """
    with json_only(as_json) as print_result:
        adapters = parse_adapters(adapter or [])
        requests = read_requests(prompt or [], data, split=split, data_dir=data_dir, limit=limit)
        names = adapter_of_each(requests, adapters)
        judge_task = _task(task, data, data_dir)

        from transformers import set_seed

        from milora.backbone.loading import load_for_inference
        from milora.inference.generation import Decoding, generate_texts

        sampling = temperature is not None or top_p is not None
        decoding = Decoding(
            max_new_tokens=max_new_tokens or (judge_task.max_new_tokens if judge_task else 128),
            beams=beams or (1 if sampling else 3),
            temperature=temperature,
            top_p=top_p,
        )
        quiet_libraries()
        results = Results(requests, names, judge_task, output, _run(backbone, adapters, decoding, seed))
        missing = results.missing()
        seconds, tokens = 0.0, 0
        if missing:
            model, tokenizer = load_for_inference(adapters, backbone, dtype=dtype, device=device)
            set_seed(seed)
            started = time.perf_counter()
            texts = generate_texts(
                model,
                tokenizer,
                [requests[index].prompt for index in missing],
                decoding,
                batch_size=batch_size,
                adapters=[names[index] for index in missing] if len(adapters) > 1 else None,
            )
            with progress_bar() as progress:
                for text in progress.track(texts, total=len(missing), description="generating"):
                    results.add(missing[text.index], text)
                    tokens += text.tokens
            seconds = time.perf_counter() - started
        summary = {
            **results.summary(),
            "generated": len(missing),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        }
        print_result(summary if output else {**summary, "texts": results.records()})
        if not as_json:
            _print(results, summary)


def parse_adapters(values: Sequence[str]) -> dict[str, str]:
    """`--adapter` options by name: `DIR` alone is the default one, several are `NAME=DIR`.

    Raises:
        MiLoraError: If one of several has no name, or two share one.
    """
    adapters: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or Path(value).exists():
            if len(values) > 1:
                raise MiLoraError(f"--adapter {value}: of several adapters each needs a name, --adapter NAME={value}.")
            name, path = DEFAULT_ADAPTER, value
        if not name or not path:
            raise MiLoraError(f"--adapter {value}: give it as DIR or NAME=DIR.")
        if name in adapters:
            raise MiLoraError(f"--adapter {value}: there is an adapter {name!r} already, {adapters[name]}.")
        adapters[name] = path
    return adapters


def adapter_of_each(requests: Sequence[Request], adapters: Mapping[str, str]) -> list[str]:
    """The adapter of each request: the one it names, or the only one (an empty name where there is none at all).

    Raises:
        MiLoraError: If a request names an adapter that is not there, or none where there are several.
    """
    only = next(iter(adapters), "") if len(adapters) < 2 else None
    names = []
    for number, request in enumerate(requests, start=1):
        # One adapter without a name serves whatever the rows say; they may come from a file for several.
        name = only if only in ("", DEFAULT_ADAPTER) else request.adapter or only
        if name is None:
            raise MiLoraError(
                f"Prompt {number} names no adapter, and there are {', '.join(adapters)}: give rows a field `adapter`."
            )
        if name not in adapters and name != only:
            raise MiLoraError(f"Prompt {number} is for the adapter {name!r}; there are {', '.join(adapters)}.")
        names.append(name)
    return names


class Results:
    """The rows of a run, in a file of JSON lines if one is given, where a later run finds what is done.

    Args:
        requests: The prompts.
        names: The adapter of each.
        task: Reads the answers; without one, an output is compared with the answer as a whole.
        path: The file, or `None`.
        run: What the rows of this run are marked with, so that those of another adapter are not taken for its own.

    Raises:
        MiLoraError: If the file has rows of other prompts or of another run.
    """

    def __init__(
        self, requests: Sequence[Request], names: Sequence[str], task: Task | None, path: Path | None, run: str
    ) -> None:
        self._requests = requests
        self._names = names
        self._task = task
        self._path = path
        self._run = run
        self._rows: dict[int, dict[str, Any]] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._resume(path)

    def missing(self) -> list[int]:
        """The prompts that have no row yet."""
        return [index for index in range(len(self._requests)) if index not in self._rows]

    def add(self, index: int, text: GeneratedText) -> None:
        """Judges a text, and writes its row at once: what is done survives an interruption."""
        request = self._requests[index]
        row: dict[str, Any] = {"row": index, "prompt": request.prompt, "output": text.text, "tokens": text.tokens}
        if self._names[index] not in ("", DEFAULT_ADAPTER):
            row["adapter"] = self._names[index]
        if request.answer is not None:
            parsed = self._task.parse(text.text) if self._task else text.text.strip()
            is_correct: Callable[[str, str], bool] = self._task.is_correct if self._task else _same
            row |= {"answer": request.answer, "parsed": parsed, "correct": is_correct(text.text, request.answer)}
        self._rows[index] = row
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "run": self._run}, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The rows in the order of the prompts."""
        return [self._rows[index] for index in sorted(self._rows)]

    def summary(self) -> dict[str, Any]:
        """`rows`, `accuracy` and `unparsed` over the rows with an answer (null where none has one), `output`."""
        judged = [row for row in self._rows.values() if "correct" in row]
        return {
            "rows": len(self._rows),
            "accuracy": sum(row["correct"] for row in judged) / len(judged) if judged else None,
            "unparsed": sum(row["parsed"] is None for row in judged) if judged else None,
            "output": str(self._path) if self._path else None,
        }

    def _resume(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        # A run that was killed may have left half a line, which is generated again.
        complete = text[: text.rfind("\n") + 1]
        for number, line in enumerate(complete.split("\n")[:-1], start=1):
            self._take(_parse(line, path, number), f"{path}, line {number}")
        if complete != text:
            with path.open("r+b") as file:
                file.truncate(len(complete.encode()))

    def _take(self, row: dict[str, Any], where: str) -> None:
        index = row.get("row")
        elsewhere = "give another --output, or remove the file"
        if row.pop("run", None) != self._run:
            raise MiLoraError(f"{where} is of a run with another adapter, backbone or settings: {elsewhere}.")
        if (
            not isinstance(index, int)
            or not 0 <= index < len(self._requests)
            or row.get("prompt") != self._requests[index].prompt
            or row.get("answer") != self._requests[index].answer
            or row.get("adapter", self._names[index]) != self._names[index]
        ):
            raise MiLoraError(f"{where} is for another prompt than these: {elsewhere}.")
        self._rows[index] = row


def _same(output: str, answer: str) -> bool:
    return output.strip() == answer.strip()


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise MiLoraError(f"{path}, line {number} is no row of milora generate: give another --output.")
    return row


def _task(name: str | None, data: str | None, data_dir: Path | None) -> Task | None:
    if name is None and data is None:
        return None
    from milora.tasks import registry

    if name is not None:
        return registry.get(name, data_dir)
    return registry.get(str(data), data_dir) if data in registry.names() else None


def _run(backbone: str | None, adapters: Mapping[str, str], decoding: Decoding, seed: int) -> str:
    """A digest of what decides the texts besides the prompts: backbone, the adapters' contents, decoding."""
    settings = {"backbone": backbone, "decoding": asdict(decoding), "seed": seed if decoding.samples else None}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, adapter in sorted(adapters.items()):
        digest.update(name.encode())
        folder = Path(adapter).expanduser()
        files: Iterable[Path] = sorted(folder.glob("adapter_*")) if folder.is_dir() else ()
        for file in files:
            with file.open("rb") as content:
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
        if not folder.is_dir():
            digest.update(adapter.encode())
    return digest.hexdigest()


def _print(results: Results, summary: Mapping[str, Any]) -> None:
    if summary["output"] is None:
        for row in results.records():
            typer.echo(row["output"].strip())
    if summary["accuracy"] is not None:
        typer.echo(
            f"accuracy {summary['accuracy']:.1%} of {summary['rows']} rows, {summary['unparsed']} without an answer",
            err=True,
        )
    if summary["output"] is not None:
        typer.echo(f"{summary['rows']} rows in {summary['output']}, {summary['generated']} of them new", err=True)
