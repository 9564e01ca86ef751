"""Scores against the computation of each reference, written out from its own weights file and processor.

The references: the README of PickScore, hpsv2/img_score.py with src/open_clip/{model,transformer}.py, ImageReward/ImageReward.py with
models/BLIP/{vit,med}.py, and simple_inference.py of the aesthetic predictor. Of those that cannot be installed here (they need
torchvision), the forward pass is written below with plain functions on the tensors of the file, under the names that they have there.
"""

import math

import pytest
import tiny_rewards
import torch
import torch.nn.functional as F

from rlr_trainer.rewards import AestheticScore, ClassifierScore, CLIPScore, HPSv2, ImageReward, PickScore
from rlr_trainer.rewards.neural.image_reward import BERT_BASE, BLIP_NAMES, SCORE_MEAN, SCORE_STD, VIT_L_16, ImageRewardModel
from rlr_trainer.rewards.neural.open_clip import VIT_H_14, convert_open_clip
from rlr_trainer.rewards.neural.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessor
from rlr_trainer.rewards.neural.weights import rename

PICTURES = tiny_rewards.photographs()
PROMPTS = tiny_rewards.PROMPTS


def score_each(reward) -> torch.Tensor:
    """[3]; the pictures have different sizes, so one at a time."""
    scores = [reward(tiny_rewards.to_tensor(picture), (prompt,), ({},)) for picture, prompt in zip(PICTURES, PROMPTS, strict=True)]
    return torch.cat(scores)


# ---- transformers' CLIP ----


def clip_outputs(folder):
    """Unit embeddings of the pictures and prompts, and the scale, as the README of PickScore gets them."""
    from transformers import CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    pixels = torch.cat(
        [CLIPImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values for picture in PICTURES]
    )
    words = tiny_rewards.tokenizer()(list(PROMPTS), padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, **words)
    return output.image_embeds, output.text_embeds, model.logit_scale.exp()


@pytest.mark.parametrize("end", [None, 2])
def test_pickscore(tmp_path, end):
    """Also with the end-of-text token 2 that old configurations have, as the published one; transformers then takes the largest."""
    tiny_rewards.clip_folder(tmp_path, **({} if end is None else {"eos_token_id": end}))
    images, texts, scale = clip_outputs(tmp_path)
    scores = score_each(PickScore.from_pretrained(tmp_path, eight_bit=True))
    torch.testing.assert_close(scores, (scale * (texts @ images.T)).diagonal(), rtol=1e-3, atol=1e-3)
    assert scores.std() > 0.1


def test_clip_score(tmp_path):
    images, texts, _ = clip_outputs(tiny_rewards.clip_folder(tmp_path))
    reward = CLIPScore.from_pretrained(tmp_path, eight_bit=True)
    expected = 100 * (images * texts).sum(-1)
    assert expected.min() > 0
    torch.testing.assert_close(score_each(reward), expected, rtol=1e-3, atol=1e-3)
    assert reward.from_cosine(torch.tensor([0.3, -0.3])).tolist() == pytest.approx([30, 0])


def test_aesthetic(tmp_path):
    """Nothing between the layers: the head is one affine map of the unit embedding."""
    tiny_rewards.aesthetic_folder(tmp_path)
    reward = AestheticScore.from_pretrained(tmp_path, eight_bit=True)
    from transformers import CLIPModel

    state = torch.load(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    clip = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    expected = []
    for picture in PICTURES:
        pixels = torchvision_pixels(picture, 28)
        with torch.no_grad():
            found = clip.get_image_features(pixel_values=pixels)
        features = getattr(found, "pooler_output", found)  # transformers 5, 4
        x = features / features.norm(dim=-1, keepdim=True)
        for number in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
        expected.append(x[0])
    torch.testing.assert_close(score_each(reward), torch.cat(expected), rtol=1e-3, atol=1e-3)


def torchvision_pixels(picture, size):
    """Resize(size, bicubic), CenterCrop(size), ToTensor, Normalize as torchvision does them with a PIL picture."""
    from PIL import Image

    width, height = picture.size
    small = (size, int(size * height / width)) if width < height else (int(size * width / height), size)
    left, top = (round((side - size) / 2.0) for side in small)
    cut = picture.resize(small, Image.BICUBIC).crop((left, top, left + size, top + size))
    return (tiny_rewards.to_tensor(cut) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


# ---- OpenCLIP ----


def open_clip_blocks(state, tower, x, heads, mask=None):
    """Residual attention blocks: x [L, N, D], as torch.nn.MultiheadAttention takes it."""
    width = x.shape[-1]
    for number in range(2):
        get = {key: state[f"{tower}transformer.resblocks.{number}.{key}"] for key in BLOCK_KEYS}
        h = F.layer_norm(x, (width,), get["ln_1.weight"], get["ln_1.bias"])
        attended, _ = F.multi_head_attention_forward(
            *(h, h, h, width, heads, get["attn.in_proj_weight"], get["attn.in_proj_bias"], None, None, False, 0.0),
            *(get["attn.out_proj.weight"], get["attn.out_proj.bias"]),
            training=False,
            need_weights=False,
            attn_mask=mask,
        )
        x = x + attended
        h = F.layer_norm(x, (width,), get["ln_2.weight"], get["ln_2.bias"])
        h = F.gelu(F.linear(h, get["mlp.c_fc.weight"], get["mlp.c_fc.bias"]))
        x = x + F.linear(h, get["mlp.c_proj.weight"], get["mlp.c_proj.bias"])
    return x


BLOCK_KEYS = [
    f"{part}.{kind}" for part in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")
]
BLOCK_KEYS += ["attn.in_proj_weight", "attn.in_proj_bias"]


def open_clip_image(state, pixels):
    """encode_image(normalize=True)."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=patch).flatten(2).permute(0, 2, 1)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, width), x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (width,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = open_clip_blocks(state, "visual.", x.permute(1, 0, 2), width // 80).permute(1, 0, 2)
    x = F.layer_norm(x[:, 0], (width,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return F.normalize(x @ state["visual.proj"], dim=-1)


def open_clip_text(state, prompts):
    """encode_text(normalize=True) of tokens that are padded with zeros to the context length."""
    words = [tiny_rewards.tokenizer()(prompt)["input_ids"] for prompt in prompts]
    context, width = state["positional_embedding"].shape
    tokens = torch.zeros(len(words), context, dtype=torch.long)
    for row, ids in enumerate(words):
        tokens[row, : len(ids)] = torch.tensor(ids)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    mask = torch.full((context, context), -torch.inf).triu(1)
    x = open_clip_blocks(state, "", x.permute(1, 0, 2), width // 64, mask).permute(1, 0, 2)
    x = F.layer_norm(x, (width,), state["ln_final.weight"], state["ln_final.bias"])
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(-1)] @ state["text_projection"], dim=-1)


def hpsv2_pixels(picture, size):
    """ToTensor, ResizeMaxSize (bicubic, on the float tensor), Normalize: see test_preprocessing for the resize itself."""
    return ImagePreprocessor.hpsv2(size)(tiny_rewards.to_tensor(picture))


@pytest.mark.parametrize(("version", "filename"), [("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")])
def test_hpsv2(tmp_path, version, filename):
    tiny_rewards.hpsv2_folder(tmp_path, filename)
    state = {key: value.float() for key, value in torch.load(tmp_path / filename, weights_only=True)["state_dict"].items()}
    images = open_clip_image(state, torch.cat([hpsv2_pixels(picture, 28) for picture in PICTURES]))
    expected = (images @ open_clip_text(state, PROMPTS).T).diagonal()
    reward = HPSv2.from_pretrained(tmp_path, version=version)
    torch.testing.assert_close(score_each(reward), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.02
    assert reward.__name__ == {"v2.0": "hpsv2", "v2.1": "hpsv2.1"}[version]


def test_open_clips_real_sizes_are_those_of_transformers():
    """ViT-H-14, without memory: every key of the layout finds its place, in its shape. 986 million parameters."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"width": 1280, "text_width": 1024, "layers": 32, "text_layers": 24, "embedding": 1024, "patch": 14, "grid": 16}
    shapes = tiny_rewards.open_clip_state(**sizes, vocabulary=49408, context=77)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = CLIPModel(CLIPConfig(**VIT_H_14))
    own, converted = model.state_dict(), convert_open_clip(state)
    assert {key: tensor.shape for key, tensor in converted.items()} == {key: tensor.shape for key, tensor in own.items()}
    assert sum(tensor.numel() for tensor in own.values()) == 986_109_441
    for tower, width in (("vision_config", 80), ("text_config", 64)):  # the heads, the one thing that the weights do not tell
        assert VIT_H_14[tower]["hidden_size"] == width * VIT_H_14[tower]["num_attention_heads"]


# ---- ImageReward ----


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(queries, keys, values, heads, bias=None):
    """softmax(q k / sqrt(d) + bias) v; [N, L, D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = weights if bias is None else weights + bias
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def blip_vision(state, pixels):
    """VisionTransformer.forward of vit.py: [N, 1 + patches, D]."""
    state = {key.removeprefix("blip.visual_encoder."): value for key, value in state.items()}
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for number in range(2):
        block = f"blocks.{number}"
        q, k, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", attend(q, k, v, width // 64))
        h = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", h)
    return norm(state, "norm", x, 1e-6)


def blip_text(state, ids, mask, picture, med):
    """BertModel.forward of med.py, mode "multimodal": [N, L, D]."""
    state = {key.removeprefix("blip.text_encoder."): value for key, value in state.items()}
    heads, eps = med["num_attention_heads"], med["layer_norm_eps"]
    x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(state, "embeddings.LayerNorm", x, eps)
    bias = (1.0 - mask[:, None, None].float()) * -10000.0
    for number in range(med["num_hidden_layers"]):
        for kind, source, added in (("attention", None, bias), ("crossattention", picture, None)):
            name = f"encoder.layer.{number}.{kind}"
            read = x if source is None else source
            parts = [linear(state, f"{name}.self.{part}", y) for part, y in (("query", x), ("key", read), ("value", read))]
            x = norm(
                state, f"{name}.output.LayerNorm", linear(state, f"{name}.output.dense", attend(*parts, heads, added)) + x, eps
            )
        name = f"encoder.layer.{number}"
        h = F.gelu(linear(state, f"{name}.intermediate.dense", x))
        x = norm(state, f"{name}.output.LayerNorm", linear(state, f"{name}.output.dense", h) + x, eps)
    return x


def test_image_reward(tmp_path):
    tiny_rewards.image_reward_folder(tmp_path)
    state = torch.load(tmp_path / "ImageReward.pt", weights_only=True)
    vocabulary = {word: number for number, word in enumerate(tiny_rewards.WORDS)}
    words = [["a", "hand", "##written", "digit"], ["seven"], ["a", "nine"]]
    ids = torch.zeros(3, 35, dtype=torch.long)  # [PAD] is 0
    for row, prompt in enumerate(words):
        tokens = [vocabulary[word] for word in ("[CLS]", *prompt, "[SEP]")]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    picture = blip_vision(state, torch.cat([torchvision_pixels(picture, 32) for picture in PICTURES]))
    x = blip_text(state, ids, (ids > 0).long(), picture, tiny_rewards.MED)[:, 0]
    for number in (0, 2, 4, 6, 7):
        x = linear(state, f"mlp.layers.{number}", x)
    expected = ((x - 0.16717362830052426) / 1.0333394966054072)[:, 0]
    reward = ImageReward.from_pretrained(tmp_path, eight_bit=True)
    scores = score_each(reward)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1
    exact = torch.stack([torchvision_pixels(picture, 32)[0] for picture in PICTURES])
    torch.testing.assert_close(reward.score(exact, torch.stack([ids, (ids > 0).long()], 1)), expected, rtol=1e-5, atol=1e-5)
    assert (SCORE_MEAN, SCORE_STD) == (0.16717362830052426, 1.0333394966054072)


def test_image_rewards_real_sizes_are_those_of_transformers():
    """BLIP with ViT-L/16 and BERT-base, without memory. 446 million parameters are used."""
    med = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "max_position_embeddings": 512,
        "vocab_size": 30524,
    }
    shapes = tiny_rewards.image_reward_shapes(med, width=1024, layers=24, patch=16, grid=14)
    with torch.device("meta"):
        state = rename({name: torch.empty(shape) for name, shape in shapes.items()}, BLIP_NAMES)
        model = ImageRewardModel(VIT_L_16, BERT_BASE)
    own = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in state.items() if not key.startswith(("vision_proj", "text_proj"))} == own
    for config in (VIT_L_16, BERT_BASE):
        assert config["hidden_size"] == 64 * config["num_attention_heads"]
    assert sum(shape.numel() for shape in own.values()) == pytest.approx(446e6, rel=0.01)


# ---- classifiers ----


def test_classifier(tmp_path):
    from transformers import ViTForImageClassification, ViTImageProcessor

    tiny_rewards.classifier_folder(tmp_path)
    processor, model = ViTImageProcessor.from_pretrained(tmp_path), ViTForImageClassification.from_pretrained(tmp_path).eval()
    pictures = [PICTURES[0], PICTURES[1], PICTURES[2].resize((64, 64))]
    pixels = torch.cat([processor(picture, return_tensors="pt").pixel_values for picture in pictures])
    with torch.no_grad():
        logits = model(pixels).logits
    for output, expected in {"probability": logits.softmax(-1), "log_probability": logits.log_softmax(-1), "logit": logits}.items():
        for target, number in {"owl": 2, 0: 0}.items():
            reward = ClassifierScore.from_pretrained(tmp_path, target, output=output, eight_bit=True)
            scores = torch.cat([reward(tiny_rewards.to_tensor(picture), ("",), ({},)) for picture in pictures])
            torch.testing.assert_close(scores, expected[:, number], rtol=1e-2, atol=1e-2)


def test_each_sample_can_bring_its_own_class(tmp_path):
    """By label or number in its metadata; NaN, "does not apply", where there is none."""
    tiny_rewards.classifier_folder(tmp_path)
    pictures = tiny_rewards.squares()
    reward = ClassifierScore.from_pretrained(tmp_path, target_key="animal")
    scores = reward(pictures, ("", "", ""), ({"animal": "dog"}, {}, {"animal": 2}))
    for row, target in ((0, 1), (2, 2)):
        fixed = ClassifierScore.from_pretrained(tmp_path, target)
        assert scores[row].item() == pytest.approx(fixed(pictures, None, None)[row].item(), rel=1e-5)
    assert scores[1].isnan()


def test_any_module_can_be_the_classifier():
    from rlr_trainer import digits

    classifier = digits.load_classifier("reward")
    pictures = tiny_rewards.squares(32)
    expected = classifier(pictures).softmax(-1)[:, 7]
    reward = ClassifierScore(classifier, 7, name="seven")
    torch.testing.assert_close(reward(pictures, None, None), expected)
    assert reward.__name__ == "seven"


def test_wrong_classes_are_refused(tmp_path):
    tiny_rewards.classifier_folder(tmp_path)
    for options, named in (
        ({}, "exactly one"),
        ({"target": 1, "target_key": "animal"}, "exactly one"),
        ({"target": 1, "output": "odds"}, "output='odds'"),
        ({"target": "cow"}, "no class 'cow'; .* labels: cat, dog, owl"),
        ({"target": -1}, "no class -1"),
    ):
        with pytest.raises(ValueError, match=named):
            ClassifierScore.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="class 3 of a classifier with 3 classes"):
        ClassifierScore.from_pretrained(tmp_path, 3)(tiny_rewards.squares(), None, None)
