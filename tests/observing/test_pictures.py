"""Pictures of a run."""

from rlr_trainer.observing.pictures import cut


class CountingFont:
    """Every character is 7 pixels wide; counts the characters that it has measured."""

    measured = 0

    def getlength(self, text):
        self.measured += len(text)
        return 7.0 * len(text)


def test_a_long_prompt_is_cut_in_a_few_looks():
    font = CountingFont()
    assert cut("x" * 12_000, font, 128) == "x" * 15 + "..."
    assert font.measured < 20 * 12_000  # cutting character by character measures millions
    assert cut("short", font, 128) == "short"
    assert cut("too long", font, 7) == "..."
