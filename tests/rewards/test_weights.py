"""Weights that are missing, damaged, or those of another model: one error, that says which file and what to do. And loading by name."""

import json
import re

import huggingface_hub.constants
import pytest
import tiny_rewards
import torch
from safetensors.torch import save_file

from rlr_trainer.cli.settings import load_reward
from rlr_trainer.rewards import AestheticScore, ClassifierScore, CLIPScore, HPSv2, ImageReward, PickScore, WeightsError
from rlr_trainer.rewards.neural.weights import companion, read_state_dict


@pytest.fixture
def offline(monkeypatch):
    """No connection to the hub, and nothing of it on this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def change(path, edit):
    state = torch.load(path, weights_only=True)
    inner = state.get("state_dict", state)
    edit(inner)
    torch.save(state, path)


# ---- what is not there ----


@pytest.mark.parametrize(
    ("name", "missing"),
    {
        "aesthetic": "cannot load 'aesthetic-model.pth' of 'trl-lib/ddpo-aesthetic-predictor'",
        "hpsv2.1": "cannot load 'HPS_v2.1_compressed.pt' of 'xswu/HPSv2'",
        "image_reward": "cannot load 'ImageReward.pt' of 'THUDM/ImageReward'",
        "pickscore": "cannot load CLIPModel of 'yuvalkirstain/PickScore_v1'",
        "clip_score": "cannot load CLIPModel of 'openai/clip-vit-large-patch14'",
    }.items(),
)
def test_without_a_connection_the_error_says_what_to_download(offline, name, missing, tmp_path):
    with pytest.raises(WeightsError, match=f"reward '{name}': {missing}.*`hf download .*pass the folder"):
        load_reward(name)
    with pytest.raises(WeightsError, match=f"reward '{name}': cannot load .* of '.*/nowhere': .*must be an existing folder"):
        load_reward(f"{name}:{tmp_path}/nowhere")
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(WeightsError, match=r"has no .*\.p.*; it holds README\.md|cannot load CLIPModel"):
        load_reward(f"{name}:{tmp_path}")


@pytest.mark.parametrize("file", ["model.safetensors", "preprocessor_config.json"])
def test_a_part_that_is_missing(tmp_path, file):
    (tiny_rewards.clip_folder(tmp_path) / file).unlink()
    with pytest.raises(WeightsError, match="cannot load (CLIPModel|ImagePreprocessor)"):
        CLIPScore.from_pretrained(tmp_path)


def test_a_tokenizer_that_is_missing(tmp_path):
    for path in tiny_rewards.clip_folder(tmp_path).glob("*"):
        if path.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            path.unlink()
    with pytest.raises(WeightsError, match="cannot load AutoTokenizer|knows . tokens and the model 578"):
        CLIPScore.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="knows 11 tokens and the model 578"):
        PickScore.from_pretrained(tmp_path, processor=bert(tmp_path / "bert"))


def bert(folder):
    from transformers import BertTokenizer

    tiny_rewards.image_reward_folder(folder)
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


# ---- what is damaged ----


@pytest.mark.parametrize(
    ("folder", "file", "load"),
    [
        (tiny_rewards.hpsv2_folder, "HPS_v2.1_compressed.pt", HPSv2.from_pretrained),
        (tiny_rewards.clip_folder, "model.safetensors", PickScore.from_pretrained),
    ],
    ids=["torch", "safetensors"],
)
def test_a_file_that_is_cut_short(tmp_path, folder, file, load):
    path = folder(tmp_path) / file
    content = path.read_bytes()
    for keep in (0, 100, len(content) // 2):
        path.write_bytes(content[:keep])
        with pytest.raises(WeightsError, match=re.escape(str(tmp_path))):
            load(tmp_path)


def test_a_file_without_tensors(tmp_path):
    for content in ({}, {"epoch": 3}, [torch.zeros(1)], {"state_dict": {}}):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(WeightsError, match="no tensors by name"):
            read_state_dict(tmp_path / "file.pt", "mine")


def test_a_file_that_would_run_code_is_not_loaded(tmp_path):
    class Code:
        def __reduce__(self):
            return (exec, ("raise SystemExit('this code must not run')",))

    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": Code()}, path)
    with pytest.raises(WeightsError, match="Weights only load failed"):
        HPSv2.from_pretrained(tmp_path, tokenizer=tiny_rewards.TOKENIZER)


def test_other_containers_of_the_same_tensors(tmp_path):
    """safetensors, a `state_dict` entry, and the prefix of DistributedDataParallel."""
    tensors = {"a.weight": torch.rand(2), "b": torch.rand(1)}
    save_file(tensors, tmp_path / "file.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in tensors.items()}}, tmp_path / "file.pt")
    for name in ("file.safetensors", "file.pt"):
        read = read_state_dict(tmp_path / name, "mine")
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)


# ---- what is another model's ----


@pytest.mark.parametrize(
    ("folder", "file", "load", "edit", "named"),
    [
        (tiny_rewards.hpsv2_folder, "HPS_v2.1_compressed.pt", HPSv2,
         lambda s: s.pop("visual.transformer.resblocks.0.attn.in_proj_bias"), r"Missing .*q_proj\.bias"),
        (tiny_rewards.hpsv2_folder, "HPS_v2.1_compressed.pt", HPSv2,
         lambda s: s.update(score_predictor=torch.zeros(1)), "Unexpected .*score_predictor"),
        (tiny_rewards.image_reward_folder, "ImageReward.pt", ImageReward,
         lambda s: s.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"), "Missing .*text.*crossattention"),
        (tiny_rewards.image_reward_folder, "ImageReward.pt", ImageReward,
         lambda s: s.update({"mlp.layers.9.bias": torch.zeros(1)}), r"Unexpected .*head\.layers\.9\.bias"),
        (tiny_rewards.aesthetic_folder, "sac+logos+ava1-l14-linearMSE.pth", AestheticScore,
         lambda s: s.update({"layers.0.weight": torch.zeros(1024, 768)}), r"size mismatch for layers\.0\.weight"),
    ],
)  # fmt: skip
def test_a_file_with_other_keys(tmp_path, folder, file, load, edit, named):
    """Missing, left over, or of another shape; nothing is left random."""
    change(folder(tmp_path) / file, edit)
    with pytest.raises(WeightsError, match=named):
        load.from_pretrained(tmp_path)


def test_a_model_with_a_part_left_random(tmp_path):
    """transformers would fill it with noise and go on."""
    from safetensors.torch import load_file

    path = tiny_rewards.clip_folder(tmp_path) / "model.safetensors"
    state = load_file(path)
    del state["visual_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"leave 1 parts of CLIPModel without values: visual_projection\.weight"):
        PickScore.from_pretrained(tmp_path)


def test_a_classifier_whose_processor_has_a_foreign_step(tmp_path):
    path = tiny_rewards.classifier_folder(tmp_path) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 1}))
    with pytest.raises(WeightsError, match="resample=1.*pass preprocess="):
        ClassifierScore.from_pretrained(tmp_path, 0)
    assert ClassifierScore.from_pretrained(tmp_path, 0, preprocess=torch.nn.Identity()).target == 0


# ---- where the parts come from ----


def test_parts_are_looked_for_beside_the_weights(tmp_path):
    default, markers = "org/name", ("vocab.json",)
    file = tmp_path / "weights.pt"
    file.write_bytes(b"")
    assert companion(tmp_path, None, default, markers) == default
    assert companion("other/hub", None, default, markers) == default
    (tmp_path / "vocab.json").write_text("{}")
    assert companion(tmp_path, None, default, markers) == str(tmp_path)
    assert companion(file, None, default, markers) == str(tmp_path)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "vocab.json").write_text("{}")
    assert companion(tmp_path, None, default, markers, "clip") == str(tmp_path / "clip")
    assert companion(tmp_path, "asked/for", default, markers) == "asked/for"


def test_parts_can_be_elsewhere(tmp_path):
    """PickScore's repository has the model alone; its processor is another's."""
    tiny_rewards.clip_folder(tmp_path / "model", parts=False)
    (tmp_path / "processor").mkdir()
    reward = PickScore.from_pretrained(tmp_path / "model", processor=tiny_rewards.clip_parts(tmp_path / "processor"))
    assert reward(tiny_rewards.squares(), tiny_rewards.PROMPTS, ({},) * 3).isfinite().all()


# ---- by name ----


@pytest.mark.parametrize(
    ("name", "folder", "kind"),
    [
        ("hpsv2", lambda folder: tiny_rewards.hpsv2_folder(folder, "HPS_v2_compressed.pt"), HPSv2),
        ("hpsv2.1", lambda folder: tiny_rewards.hpsv2_folder(folder, "mine.pt") / "mine.pt", HPSv2),
        ("aesthetic", tiny_rewards.aesthetic_folder, AestheticScore),
        ("clip_score", tiny_rewards.clip_folder, CLIPScore),
        ("image_reward", tiny_rewards.image_reward_folder, ImageReward),
        ("pickscore", tiny_rewards.clip_folder, PickScore),
    ],
)
def test_rewards_are_loaded_by_name(tmp_path, name, folder, kind):
    """From a folder, or the file itself."""
    reward = load_reward(f"{name}:{folder(tmp_path / 'weights')}")
    assert type(reward) is kind
    assert reward.__name__ == name


def test_a_classifier_by_name(tmp_path):
    folder = tiny_rewards.classifier_folder(tmp_path)
    assert load_reward(f"classifier:{folder}:owl").target == 2
    assert load_reward(f"classifier:{folder}:1").target == 1
    for name in ("classifier", "classifier:owl"):
        with pytest.raises(ValueError, match="classifier:SOURCE:CLASS"):
            load_reward(name)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError, match=r"reward='pick': must be ink, .*hpsv2\.1.*classifier:SOURCE:CLASS, .*or package\.module:function"
    ):
        load_reward("pick")
