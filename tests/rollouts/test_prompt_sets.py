"""The sets of prompts that ship."""

import hashlib
import random

import pytest

from rlr_trainer.cli.settings import load_prompts
from rlr_trainer.rollouts.prompt_sets import PROMPT_SETS, prompt_function, prompt_set
from rlr_trainer.rollouts.prompts import DatasetPrompts

COUNTS = {"ddpo_animals": 45, "ddpo_activities": 135, "counting_things": 240, "ocr_signs": 300}


def test_every_set_has_its_rows_and_trains():
    assert {name: len(prompt_set(name)) for name in PROMPT_SETS} == COUNTS
    for name in PROMPT_SETS:
        rows = load_prompts(name)  # as a run's file names it
        texts = [row["prompt"] for row in DatasetPrompts(rows, 0).dataset]
        assert len(set(texts)) == len(texts)


def test_rows_say_what_a_reward_wants_to_know():
    assert prompt_set("ddpo_animals")[20] == {"prompt": "an ant", "animal": "ant"}
    assert {row["prompt"] for row in prompt_set("ddpo_activities")} >= {"a cat riding a bike", "an ant playing chess"}
    names = "\n".join(row["animal"] for row in prompt_set("ddpo_animals"))
    published = "f6775ca73413cbd26a2c9bb74ab3751b5dad0ce72b3b1f5fd91161e6b55386ba"  # the lines of ddpo-pytorch's simple_animals.txt
    assert hashlib.sha256(names.encode()).hexdigest() == published
    for row in prompt_set("counting_things"):
        word, thing = row["prompt"].split()[:2]
        assert thing.startswith(row["thing"][:3]) and (word == "one") == (row["count"] == 1) == (thing == row["thing"])
        assert row["answer"] == str(row["count"])
    assert all(row["prompt"].endswith(f'"{row["text"]}"') for row in prompt_set("ocr_signs"))


def test_a_prompt_function_follows_pythons_generator():
    draw, state = prompt_function("ddpo_activities"), random.getstate()
    try:
        random.seed(3)
        first = [draw() for _ in range(5)]
        random.seed(3)
        assert [draw() for _ in range(5)] == first
    finally:
        random.setstate(state)
    assert set(first[0][1]) == {"animal", "activity"}
    with pytest.raises(ValueError, match="must be one of ddpo_animals"):
        prompt_function("animals")
