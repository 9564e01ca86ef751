"""HPSv2 and ImageReward have one architecture each; the tests' weights are of a tiny one."""

import pytest
import tiny_rewards

from rlr_trainer.rewards import HPSv2, ImageReward


@pytest.fixture(scope="session", autouse=True)
def _tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HPSv2, "CONFIG", tiny_rewards.open_clip_config())
        patch.setattr(ImageReward, "CONFIG", (tiny_rewards.BLIP_VISION, tiny_rewards.MED))
        yield
