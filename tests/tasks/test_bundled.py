"""The bundled tasks: properties of their rows, and answers recomputed from prompts."""

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora.backbone.bundled import TINY_BACKBONE
from milora.tasks.bundled import BUNDLED_TASKS, GeneratedTask
from milora.tasks.bundled.base import DEFAULT_ROWS, split_of
from milora.tasks.bundled.corpus import WRITERS, documents
from milora.tasks.bundled.world import FACTS
from milora.tasks.task import SPLITS, Example
from milora_core.errors import MiLoraError

ROWS = 300
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
}

every_task = pytest.mark.parametrize("task", BUNDLED_TASKS.values(), ids=list(BUNDLED_TASKS))


def rows(name: str) -> list[Example]:
    return [example for split in SPLITS for example in BUNDLED_TASKS[name].examples(split, ROWS)]


def content_of(task: GeneratedTask, example: Example) -> object:
    """The content that decides a row's split, extracted from its text."""
    if task.name == "bundled-yesno":
        return example.prompt.splitlines()[0]
    if task.name == "bundled-arithmetic":
        return example.prompt.split("How many")[0]
    if task.name == "bundled-extraction":
        return example.prompt.split("Find:")[0]
    return example.prompt


def test_the_tasks_are_known_by_their_names() -> None:
    assert len(BUNDLED_TASKS) >= 4
    assert all(task.name == name and name.startswith("bundled-") for name, task in BUNDLED_TASKS.items())


@every_task
def test_the_splits_share_no_row_and_no_content_whatever_the_seed(task: GeneratedTask) -> None:
    train = [example for seed in (0, 1) for example in task.examples("train", 1000, seed)]
    dev = [example for seed in (0, 2) for example in task.examples("dev", 200, seed)]
    test = [example for seed in (0, 3) for example in task.examples("test", 200, seed)]
    contents = [{content_of(task, example) for example in split} for split in (train, dev, test)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not contents[one] & contents[other]


def test_a_content_has_one_split_and_four_in_five_are_for_training() -> None:
    splits = [split_of(f"content {number}") for number in range(5000)]
    assert splits == [split_of(f"content {number}") for number in range(5000)]
    assert {split: round(splits.count(split) / 5000, 1) for split in SPLITS} == {"train": 0.8, "dev": 0.1, "test": 0.1}


@every_task
def test_rows_are_distinct_and_fixed_by_the_seed(task: GeneratedTask) -> None:
    once = task.examples("train", ROWS)
    assert once == task.examples("train", ROWS)
    assert once[:20] == task.examples("train", 20)
    assert once != task.examples("train", ROWS, seed=1)
    assert len({example.prompt for example in once}) == ROWS


def test_rows_are_the_same_in_another_process() -> None:
    program = (
        "from milora.tasks.bundled import BUNDLED_TASKS\n"
        "print([task.examples('test', 5, 7) for task in BUNDLED_TASKS.values()])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str([task.examples("test", 5, 7) for task in BUNDLED_TASKS.values()])


@every_task
def test_a_split_without_a_count_has_its_default_rows(task: GeneratedTask) -> None:
    assert len(task.examples("dev")) == DEFAULT_ROWS["dev"]
    assert list(task.examples("dev", 0)) == []


@every_task
def test_an_unknown_split_is_refused(task: GeneratedTask) -> None:
    with pytest.raises(MiLoraError, match="A split is one of train, dev, test; found 'valid'"):
        task.examples("valid", 1)  # type: ignore[arg-type]


@every_task
def test_a_gold_completion_gives_its_own_answer(task: GeneratedTask) -> None:
    for example in rows(task.name):
        assert task.parse(example.completion) == example.answer
        assert task.is_correct(example.completion, example.answer)
        # Text after the answer, from a model that does not stop, changes nothing.
        assert task.is_correct(f"{example.completion}\nPassage: Ada likes soup.", example.answer)


@every_task
@pytest.mark.parametrize("output", ["", " ", "yes", "no", "answer1", "7", "correct:", "the correct answer is yes"])
def test_an_output_without_an_answer_is_wrong(task: GeneratedTask, output: str) -> None:
    assert task.parse(output) is None
    assert not task.is_correct(output, "yes")


@every_task
def test_the_answers_are_spread(task: GeneratedTask) -> None:
    answers = [example.answer for example in task.examples("test", ROWS)]
    most = max(answers.count(answer) for answer in set(answers))
    assert most < 0.6 * ROWS


def test_yesno_answers_follow_from_the_passage() -> None:
    for example in rows("bundled-yesno"):
        passage, question, _ = example.prompt.splitlines()
        ((name, claimed),) = re.findall(r"Question: Does (\w+) eat (\w+)\?", question)
        eaten = dict(re.findall(r" (\w+) (\w+)[,.]", passage.removeprefix("Passage: For lunch,")))
        assert example.answer == ("yes" if eaten[name] == claimed else "no")
        assert claimed in eaten.values()
        assert example.completion == f" correct: {name} {eaten[name]}, {example.answer}"


def test_choice_answers_are_the_only_true_option() -> None:
    facts = {f"{beginning} {subject}": value for beginning, known in FACTS.items() for subject, value in known.items()}
    for example in rows("bundled-choice"):
        question, options = example.prompt.split("? Options: ")
        labels = dict(re.findall(r"(\w+) (answer\d)", options))
        assert sorted(labels.values()) == [f"answer{index}" for index in range(1, 5)]
        assert labels[facts[question]] == example.answer


def test_arithmetic_chains_are_right_and_follow_the_story() -> None:
    for example in rows("bundled-arithmetic"):
        steps = re.findall(r"(\d+) ([-+]) (\d+) = (\d+)", example.completion)
        assert len(steps) == 2
        for left, operator, right, result in steps:
            assert OPERATORS[operator](int(left), int(right)) == int(result)
            assert 0 < int(result) < 10
        assert steps[1][0] == steps[0][3]
        assert int(steps[1][3]) == int(example.answer) == told_by_story(example.prompt)


def told_by_story(prompt: str) -> int:
    """The number of things after the story, from its text alone."""
    number = 0
    for verb, amount in re.findall(r"(\w+) (\d)", prompt):
        if verb == "had":
            number = int(amount)
        elif verb in ("found", "won", "bought", "got"):
            number += int(amount)
        else:
            assert verb in ("lost", "sold", "broke", "spent")
            number -= int(amount)
    return number


def test_extraction_answers_are_the_value_of_the_field() -> None:
    for example in rows("bundled-extraction"):
        record, asked, _ = example.prompt.splitlines()
        values = dict(re.findall(r" (\w+) (\w+)[,.]", record.removeprefix("Record:")))
        assert example.answer == values[asked.removeprefix("Find: ")]
        assert len(values) == len(set(values.values())) == 5


@every_task
def test_the_token_budget_suffices_and_prompts_are_short(task: GeneratedTask) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_BACKBONE)
    examples = rows(task.name)
    completions = tokenizer([example.completion for example in examples], add_special_tokens=False)["input_ids"]
    # Plus the end token.
    assert max(map(len, completions)) + 1 <= task.max_new_tokens
    assert max(map(len, tokenizer([example.prompt for example in examples])["input_ids"])) <= 80


def test_the_corpus_never_shows_the_form_of_the_answers() -> None:
    stream = documents(seed=0)
    texts = [next(stream).text for _ in range(3000)]
    assert not [text for text in texts if "correct" in text]
    for task in BUNDLED_TASKS.values():
        assert not [text for text in texts if task.parse(text) is not None]


def test_the_corpus_is_fixed_by_its_seed() -> None:
    once, again, other = documents(3), documents(3), documents(4)
    first = [next(once) for _ in range(50)]
    assert first == [next(again) for _ in range(50)]
    assert first != [next(other) for _ in range(50)]
    assert len(WRITERS) >= 8


@pytest.mark.parametrize("text", ["", "naïve żółć", "漢字 🙂", "a  b\n\n\tc 0123", "\x00\x7f"])
def test_the_bundled_tokenizer_is_lossless(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_BACKBONE)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_bundled_tokenizer_splits_numbers_into_digits() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_BACKBONE)
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_the_bundled_tokenizer_renders_a_chat() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_BACKBONE)
    messages = [{"role": "user", "content": "Where does a cow live?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>User: Where does a cow live?\nAssistant: "
    messages.append({"role": "assistant", "content": "On the farm."})
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(f"{prompt}On the farm.</s>")


def test_the_bundled_backbone_is_as_small_as_promised() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_BACKBONE)
    assert 2_000_000 <= model.num_parameters() <= 4_000_000
    assert model.dtype == torch.bfloat16
    assert sum(file.stat().st_size for file in TINY_BACKBONE.iterdir()) <= 8_000_000


def test_no_row_of_the_bundled_backbone_is_empty() -> None:
    """DoRA divides by the norm of a row."""
    model = AutoModelForCausalLM.from_pretrained(TINY_BACKBONE)
    assert all(weight.norm(dim=1).min() > 0 for weight in model.parameters() if weight.ndim == 2)
