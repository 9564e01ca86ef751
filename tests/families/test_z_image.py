"""Z-Image."""

import inspect

import pytest
from families.conformance import CONFORMANCE
from families.tiny.z_image import make_pipeline

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

SIZE = 16  # pixels; every pipeline's own size is 1024


@pytest.mark.parametrize("check", CONFORMANCE)
@pytest.mark.medium
def test_it_conforms(check):
    check_adapter(make_pipeline, height=SIZE, width=SIZE, checks=[check])


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (0.5, True)])
def test_guidance_counts_from_zero(scale, guided):
    assert adapt(make_pipeline()).is_guided(scale) == guided


@pytest.mark.parametrize(("height", "width", "named"), [(1028, SIZE, "height=1028"), (SIZE, 1028, "width=1028")])
def test_sizes_beyond_the_positions_are_refused(height, width, named):
    with pytest.raises(ValueError, match=f"{named}.* 1024 pixels at most"):
        adapt(make_pipeline()).layout(height, width)


def test_prompts_have_the_length_of_the_pipelines_call():
    pipeline = make_pipeline()
    default = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
    assert adapt(pipeline).max_sequence_length == default


@pytest.mark.parametrize(("options", "named"), [({"in_channels": 8}, "8 channels"), ({"all_patch_size": (4,)}, "patches of")])
def test_transformers_of_other_pipelines_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        adapt(make_pipeline(**options))
