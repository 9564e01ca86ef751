"""The benchmark's task that reads: the probability of a text, with a recognizer of the test's own; and rapidocr's, where it is installed."""

import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import ocr
from benchmarks.analysis import score_of
from benchmarks.driver import PLAN
from benchmarks.methods import METHODS
from benchmarks.tasks import TASKS

INSTALLED = all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime"))


def read(path):
    """The text of a path of characters: repeats are one character, blanks (0) none."""
    return [character for character, _ in itertools.groupby(path) if character]


@pytest.mark.parametrize("text", [[2], [1, 3], [2, 2]])
def test_the_probability_of_a_text_is_the_sum_over_its_paths(text):
    probabilities = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = [
        sum(row[range(4), path].prod() for path in map(list, itertools.product(range(4), repeat=4)) if read(path) == text)
        for row in probabilities
    ]
    torch.testing.assert_close(ocr.text_probability(probabilities, text), torch.stack(expected))


def test_a_probability_of_zero_is_no_error():
    certain = F.one_hot(torch.tensor([[0, 2, 2, 0], [0, 1, 0, 0]]), 4).float()
    torch.testing.assert_close(ocr.text_probability(certain, [2]), torch.tensor([1.0, 0.0]))


def test_a_page_is_black_on_white_with_a_margin():
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1
    page = ocr.as_page(images)
    assert page.shape == (1, 3, 48, 48)
    assert page[0, 0, 24, 8] == 1 and page[0, 0, 24, 40] == -1
    assert page[..., :4].eq(1).all() and page[..., -4:].eq(1).all() and page[..., :4, :].eq(1).all()


def test_the_reward_is_read_in_batches_in_order_and_without_a_gradient(monkeypatch):
    sizes = []

    def darkness(pages):
        """Reads "7" with the share of black as its probability, else a blank."""
        sizes.append(len(pages))
        black = (1 - pages[:, 0, 24, 24]) / 2
        return torch.stack([1 - black, torch.zeros_like(black), black], -1)[:, None]

    monkeypatch.setattr(ocr, "load_recognizer", lambda: (darkness, ["", "1", "7"]))
    shares = torch.linspace(0, 1, 17)
    images = shares[:, None, None, None].expand(-1, 3, 32, 32).clone().requires_grad_()
    values = TASKS["ocr"].reward()(images, ("",) * 17, ({},) * 17)
    torch.testing.assert_close(values, shares)
    assert sizes == [8, 8, 1] and not values.requires_grad and values.dtype == torch.float32
    assert ocr.ocr_reward(1)(images, ("",) * 17, ({},) * 17).max() < 1e-6  # another digit


def test_without_the_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'rlr-trainer\[benchmark\]'"):
        ocr.load_recognizer.__wrapped__()


def test_the_task_is_planned_for_methods_without_a_gradient_and_judged():
    [methods] = [methods for _, task, methods, _ in PLAN if task == "ocr"]
    assert not TASKS["ocr"].differentiable and not any(METHODS[name].needs_gradient for name in methods)
    assert score_of("ocr") == "judge" and TASKS["ocr"].target is not None


@pytest.mark.skipif(not INSTALLED, reason="rapidocr or onnxruntime is not installed")
def test_most_real_digits_are_read_and_no_others():
    from sklearn.datasets import load_digits

    real = load_digits()
    grey = torch.tensor(real.images[:100] / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(grey, size=(32, 32), mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    recognize, characters = ocr.load_recognizer()
    own = F.one_hot(torch.tensor(real.target[:100]), 10).bool()

    def read_as_digits(pictures):
        probabilities = recognize(ocr.as_page(pictures))
        return torch.stack([ocr.text_probability(probabilities, [characters.index(str(digit))]) for digit in range(10)], 1)

    values = read_as_digits(images)
    assert (values[own] > 0.5).float().mean() > 0.8
    assert values[~own].mean() < 0.02
    # the test can fail: upside down, few but 0, 1, 3 and 8 are read as themselves
    assert (read_as_digits(images.flip(-2))[own] > 0.5).float().mean() < 0.6
    torch.testing.assert_close(ocr.ocr_reward(7)(images[:20], ("",) * 20, ({},) * 20), values[:20, 7], atol=1e-4, rtol=0)
