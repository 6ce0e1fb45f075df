"""The shop's tasks: every row's answer follows from its prompt."""

import re
from collections import Counter

import pytest

from milora.tasks import registry
from milora.tasks.shop import SENTENCES, SHOP_TASKS
from milora.tasks.task import SPLITS, Task

ROWS = 200

every_task = pytest.mark.parametrize("task", SHOP_TASKS.values(), ids=list(SHOP_TASKS))


@every_task
def test_splits_share_no_prompt_and_a_seed_gives_the_same_rows(task: Task) -> None:
    rows = {split: task.examples(split, ROWS, seed=3) for split in SPLITS}
    prompts = [{row.prompt for row in of_split} for of_split in rows.values()]
    assert len(set.union(*prompts)) == 3 * ROWS
    assert task.examples("dev", ROWS, seed=3) == rows["dev"]
    assert task.examples("dev", ROWS, seed=4) != rows["dev"]
    assert registry.get(task.name) is task


@every_task
def test_a_completion_is_its_answer_and_other_text_is_not(task: Task) -> None:
    for row in task.examples("test", ROWS):
        assert task.is_correct(row.completion, row.answer)
        assert task.is_correct(f"{row.completion}\nand more", row.answer)
        assert not task.is_correct("", row.answer)
        assert not task.is_correct("I do not know", row.answer)


def test_yes_and_no_follow_from_the_order_and_are_as_frequent() -> None:
    rows = SHOP_TASKS["shop-yesno"].examples("train", 1000)
    for row in rows:
        order, question, _ = row.prompt.split("\n")
        asked = re.search(r"(?:buy|sent to|sent on) (.*)\?", question)
        assert asked is not None
        assert row.answer == ("yes" if asked[1] in order else "no")
        detail, judged = row.completion.strip().split(": ")
        assert detail in order
        assert judged == row.answer
    counts = Counter(row.answer for row in rows)
    assert 450 < counts["yes"] < 550


def test_a_message_is_for_the_department_whose_sentence_it_is() -> None:
    for row in SHOP_TASKS["shop-department"].examples("train", ROWS):
        of = [
            department
            for department, sentences in SENTENCES.items()
            for sentence in sentences
            if re.search(re.sub(r"\{\w+\}", ".+", sentence).replace("?", r"\?"), row.prompt)
        ]
        assert of == [row.answer]


def test_a_record_holds_what_the_order_says() -> None:
    for row in SHOP_TASKS["shop-record"].examples("train", ROWS):
        found = re.match(r"Order \d+: (.+) bought (.+)\. They were sent to (.+) on \w+\.", row.prompt)
        assert found is not None
        assert row.answer == "; ".join(found.groups())
