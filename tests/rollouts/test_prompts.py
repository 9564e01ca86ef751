"""Prompt sources."""

import contextlib
import copy
import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from rlr_trainer import digits
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, open_dataset


def rows(count):
    return [{"prompt": f"prompt {i}", "number": i} for i in range(count)]


def test_passes_follow_each_other_without_a_gap_and_each_is_a_permutation():
    source = DatasetPrompts(rows(5), seed=0)
    taken = [row.metadata["number"] for _ in range(5) for row in source.take(3)]
    assert [sorted(taken[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert len({tuple(taken[i : i + 5]) for i in (0, 5, 10)}) > 1


def test_order_is_a_function_of_seed_and_position():
    whole = DatasetPrompts(rows(7), seed=3)
    expected = [row.prompt for row in whole.take(20)]
    resumed = DatasetPrompts(rows(7), seed=3)
    resumed.load_state_dict({"taken": 9})
    assert [row.prompt for row in resumed.take(11)] == expected[9:]
    assert [row.prompt for row in DatasetPrompts(rows(7), seed=4).take(20)] != expected
    assert [row.prompt for row in DatasetPrompts(rows(3), 0, shuffle=False).take(4)] == [f"prompt {i}" for i in (0, 1, 2, 0)]


def test_peeking_loses_nothing():
    calls = iter(range(100))
    for source in (FunctionPrompts(lambda: (str(next(calls)), {})), DatasetPrompts(rows(4), 0)):
        ahead = source.peek(3)
        assert source.take(2) == ahead[:2]
        assert source.take(2)[0] == ahead[2]


def test_negative_prompts_of_rows():
    source = DatasetPrompts(
        [{"prompt": "a", "negative_prompt": "blurred"}, {"prompt": "b", "negative_prompt": None}], 0, shuffle=False
    )
    first, second = source.take(2)
    assert first.negative_prompt == "blurred"
    assert second.negative_prompt is None


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "has no rows"),
        ([{"text": "a"}], ValueError, r"row 0 has the columns text, but needs 'prompt': rename one"),
        (Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset(), TypeError, "IterableDataset: must be a datasets.Dataset"),
        (DatasetDict({"test": Dataset.from_list([{"prompt": "a"}])}), TypeError, "DatasetDict: must be .*take one split"),
        (Dataset.from_list([{"prompt": "a"}]).to_pandas(), TypeError, "is a DataFrame: must be a datasets.Dataset"),
        ([["a"]], TypeError, "row 0 is a list: all rows must be dicts"),
        ([{"prompt": "a"}, {"text": "b"}], ValueError, "row 1 has the columns text"),
        ([{"prompt": "a"}, "b"], TypeError, "row 1 is a str"),
        ([{"prompt": 3}], TypeError, r"row 0 holds 3 \(int\) in the column 'prompt': must be one string"),
        ([{"prompt": "a", "negative_prompt": 3}], TypeError, "holds 3 .*'negative_prompt'"),
        ([{"prompt": "a", "scale_prompts": "a"}], TypeError, "holds 'a' in the column 'scale_prompts': must be a list of strings"),
        (Dataset.from_list([{"prompt": "a"}, {"prompt": None}]), TypeError, "row 1 has no text in the column 'prompt'"),
        (Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}]), TypeError, "of a conversation"),
    ],
)
def test_datasets_that_cannot_be(dataset, error, message):
    with pytest.raises(error, match=message):
        DatasetPrompts(dataset, 0)


@pytest.mark.parametrize("returned", ["words", ("words",), (1, {}), None])
def test_functions_that_return_something_else(returned):
    with pytest.raises(TypeError, match=r"must return a pair \(prompt, metadata\)"):
        FunctionPrompts(lambda: returned).take(1)


def test_a_dataset_with_an_order_of_its_own_and_a_transform():
    dataset = Dataset.from_list(rows(6)).shuffle(seed=1).select([4, 0])
    expected = [dataset[0]["prompt"], dataset[1]["prompt"]]
    assert [row.prompt for row in DatasetPrompts(dataset, 0, shuffle=False).take(2)] == expected
    dataset = Dataset.from_list([{"subject": "cat"}]).with_transform(lambda batch: {"prompt": [f"a {s}" for s in batch["subject"]]})
    assert DatasetPrompts(dataset, 0).take(1)[0].prompt == "a cat"


def test_commas_in_a_csv_file_shift_and_lose_nothing(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,level\n"a cat, sitting",1\n')
    assert list(open_dataset(path)) == [{"prompt": "a cat, sitting", "level": 1}]
    for content in ("prompt\na cat, sitting\na dog, running\n", "prompt,level\na cat, sitting,1\n"):
        path.write_text(content)
        with pytest.raises(
            ValueError, match="cannot be read: Length of header .*; put texts that contain a comma in double quotes"
        ):
            open_dataset(path)


def test_only_the_ends_of_lines_separate_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein B\u00e4r\r\n\r\na\u2028b\x0bc\n".encode())
    assert open_dataset(path) == [{"prompt": "ein B\u00e4r"}, {"prompt": "a\u2028b\x0bc"}]


@pytest.mark.parametrize("name", ["prompts.json", "prompts.csv", "prompts.parquet"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name}'.* cannot be read: "):
        open_dataset(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("prompts.txt", {"split": "test"}, "split='test'.*: a file has no splits"),
        ("prompts.txt", {"column": "caption"}, "column='caption': a file has .* no columns"),
        ("prompts.csv", {"name": "large"}, "name='large'.*: a file has no .*configurations"),
        ("one", {"split": "test"}, "has no split='test' .*, but the splits train"),
        ("several", {"split": "test", "name": "large"}, "name='large', but the splits test, dev without one"),
    ],
)
def test_nothing_that_is_asked_of_a_source_is_ignored(tmp_path, name, options, message):
    one = Dataset.from_list([{"prompt": "a"}])
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "prompts.csv").write_text("prompt\na\n")
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"test": one, "dev": one}).save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / name, **options)


def test_a_list_of_strings_is_a_dataset():
    assert [row.prompt for row in DatasetPrompts(["a", "b"], 0, shuffle=False).take(3)] == ["a", "b", "a"]


@pytest.mark.medium
def test_a_training_run_on_groups_with_metadata(make_trainer):
    """Two prompts with two pictures each; the other columns arrive with their own prompt."""
    seen = []

    def reward(images, prompts, metadata):
        seen.append(list(zip(prompts, metadata, strict=True)))
        return images.mean(dim=(1, 2, 3))

    dataset = Dataset.from_list([{"prompt": digits.class_prompt(d), "digit": d, "tags": ["x"] * d} for d in range(4)])
    trainer = make_trainer(
        reward_function=reward, train_dataset=dataset, estimator="ddpo", num_images_per_prompt=2, max_steps=2, check_reward=False
    )
    trainer.train()
    assert [len(batch) for batch in seen] == [4, 4]
    for batch in seen:
        assert batch[0] == batch[1]
        assert batch[2] == batch[3]
        assert batch[0] != batch[2]
        for prompt, metadata in batch:
            assert prompt == digits.class_prompt(metadata["digit"])
            assert metadata["tags"] == ["x"] * metadata["digit"]
    assert sorted(metadata["digit"] for batch in seen for _, metadata in batch[::2]) == [0, 1, 2, 3]


@pytest.mark.medium
def test_a_negative_prompt_of_a_row_changes_only_that_rows_picture(make_trainer, pipeline):
    def pictures(negatives):
        kept = []

        def reward(images, prompts, metadata):
            kept.append(images)
            return images.mean(dim=(1, 2, 3))

        dataset = [{"prompt": digits.PROMPT, "negative_prompt": negative} for negative in negatives]
        trainer = make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), reward_function=reward, train_dataset=dataset, estimator="ddpo",
            sample_guidance_scale=3.0, max_steps=1, shuffle_prompts=False, check_reward=False, overwrite=True,
        )  # fmt: skip
        trainer.train()
        return kept[0]

    plain, changed = pictures([None] * 4), pictures([None, digits.class_prompt(3), None, None])
    same = [torch.allclose(plain[i], changed[i], atol=1e-5) for i in range(4)]
    assert same == [True, False, True, True]


# ---- files and the hub ----


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same two rows in every form."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = [{"prompt": "a cat", "n": 1}, {"prompt": "a dog", "n": 2}]
    dataset = Dataset.from_list(data)
    (tmp_path / "rows.json").write_text(json.dumps(data))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    dataset.to_csv(tmp_path / "rows.csv")
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "words.csv").write_text("caption,n\na cat,1\na dog,2\n")
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  a dog \n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "saved", "splits"])
def test_datasets_in_files(files, name):
    taken = DatasetPrompts(str(files / name), 0, shuffle=False).take(2)
    assert [(row.prompt, row.metadata) for row in taken] == [("a cat", {"n": 1}), ("a dog", {"n": 2})]


def test_text_files_splits_and_columns(files):
    assert open_dataset(files / "prompts.txt") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    assert list(open_dataset(files / "splits", split="test")["prompt"]) == ["a dog"]
    assert list(open_dataset(files / "words.csv", column="caption")["prompt"]) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("nothing.txt", {}, "must be a file that exists"),
        ("rows.tsv", {}, "must be a file that exists"),
        ("empty.txt", {}, "no line with a prompt"),
        ("latin.txt", {}, "cannot be read: 'utf-8' codec"),
        ("broken.json", {}, "cannot be read"),
        ("words.csv", {"column": "text"}, "no column 'text', but caption, n"),
    ],
)
def test_files_that_cannot_be_read(files, name, options, says):
    (files / "rows.tsv").write_text("prompt\na\n")
    (files / "empty.txt").write_text("\n")
    (files / "latin.txt").write_bytes(b"caf\xe9\n")
    (files / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=says) as caught:
        open_dataset(str(files / name), **options)
    assert f"train_dataset='{files / name}'" in str(caught.value)


def test_a_hub_id_without_a_network(monkeypatch):
    import datasets

    asked = []

    def offline(path, name, split):
        asked.append((path, name, split))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"'owner/words': cannot be read: .*reach the Hub; no such file exists, and a hub id needs"
    ):
        open_dataset("owner/words", split="test", name="small")
    assert asked == [("owner/words", "small", "test")]


def test_the_trainer_opens_files(make_trainer, files):
    trainer = make_trainer(train_dataset=str(files / "prompts.txt"), eval_dataset=files / "rows.jsonl")
    assert len(trainer.prompts) == len(trainer.eval_prompts) == 2
    assert {"eval_reward", "eval_reward_std"} <= trainer.evaluate().keys()


# ---- states of prompt functions ----


class Counter:
    """A prompt function with a state of its own."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return f"prompt {self.count}", {"n": self.count}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def draw(self):
        return self()


@pytest.mark.parametrize("make", [lambda: Counter(), lambda: Counter().draw], ids=["object", "method"])
def test_a_function_with_a_state_goes_on_where_it_was(make, tmp_path):
    source = FunctionPrompts(make())
    source.take(3)
    source.peek(2)  # drawn, not yet used
    torch.save(source.state_dict(), tmp_path / "state.pt")
    expected = source.take(4)
    resumed = FunctionPrompts(make())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.take(4) == expected


def test_prompts_that_were_drawn_ahead_are_kept(tmp_path):
    source = FunctionPrompts(lambda: (["coarse", "fine"], {"n": random.random()}))
    assert source.state_dict() == {}
    ahead = source.peek(2)
    resumed = FunctionPrompts(lambda: ("other", {}))
    torch.save(source.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.take(3) == [*ahead, FunctionPrompts(lambda: ("other", {})).take(1)[0]]


def test_a_state_that_only_one_side_has_is_warned_of(caplog):
    FunctionPrompts(Counter()).load_state_dict({})
    assert "prompt_function has a state for the prompts and the checkpoint has none" in caplog.text
    FunctionPrompts(lambda: ("a", {})).load_state_dict({"function": {"count": 1}})
    assert "the checkpoint has a state for the prompts and prompt_function has none" in caplog.text


@pytest.mark.medium
def test_negative_prompts_without_guidance_are_said_to_be_unused(make_trainer, caplog):
    from rlr_trainer.rollouts import sampler

    sampler._warn_of_unused_negative_prompts.cache_clear()
    make_trainer(max_steps=1).train()
    assert "negative prompts" not in caplog.text
    make_trainer(max_steps=1, overwrite=True, negative_prompt="blurry").train()
    assert "with sample_guidance_scale of 1 or less" in caplog.text


# ---- borrowed prompts ----


@pytest.mark.parametrize("kind", ["global", "own", "dataset"])
def test_borrowing_shows_the_next_prompts_and_leaves_them_to_the_training(kind):
    def source():
        if kind == "dataset":
            return DatasetPrompts(rows(7), 0)
        own = iter(range(1000))

        def draw():
            return [random.random(), float(np.random.rand()), float(torch.rand(()))] if kind == "global" else next(own)

        return FunctionPrompts(lambda: (str(draw()), {}))

    def start():
        random.seed(5)
        np.random.seed(5)
        prompts = source()
        prompts.peek(3)
        return prompts

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = start().take(30)
        torch.manual_seed(5)
        prompts = start()
        with prompts.borrowed() as borrowed:
            assert borrowed.take(4) + borrowed.take(4) == expected[:8]
            torch.rand(3)  # as sampling and rewards do
            random.random()
        assert prompts.take(1) == expected[:1]
        with contextlib.suppress(KeyError), prompts.borrowed() as borrowed:
            seen = borrowed.take(5)
            raise KeyError
        assert seen == expected[1:6]
        assert prompts.take(29) == expected[1:]
