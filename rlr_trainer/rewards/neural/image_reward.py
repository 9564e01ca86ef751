"""ImageReward (arXiv:2304.05977): BLIP's text encoder reads the prompt with cross-attention to the picture; a head scores its first token.

The published checkpoint (github.com/THUDM/ImageReward, ImageReward/ImageReward.py) has the layout of the original BLIP code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rlr_trainer.rewards.neural import weights
from rlr_trainer.rewards.neural.base import ModelOptions, NeuralReward, PromptCache, ScoreHead, token_ids
from rlr_trainer.rewards.neural.open_clip import tower
from rlr_trainer.rewards.neural.preprocessing import ImagePreprocessor

# The head's mean and standard deviation over the reference's data: the reward is standardised by them.
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072
PROMPT_TOKENS = 35
BERT = "google-bert/bert-base-uncased"
BERT_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
UNUSED_KEYS = r"(vision|text)_proj\.(weight|bias)|text\.embeddings\.position_ids"
VIT_L_16 = tower(1024, layers=24, heads=16, image_size=224, patch_size=16, layer_norm_eps=1e-6)
BERT_BASE = tower(768, layers=12, heads=12, vocab_size=30524, max_position_embeddings=512, layer_norm_eps=1e-12, pad_token_id=0)

# BLIP's names -> those of `ImageRewardModel`.
BLIP_NAMES = {
    r"^blip\.visual_encoder\.": "vision.",
    r"^blip\.text_encoder\.": "text.",
    r"^blip\.": "",
    r"^mlp\.": "head.",
    r"^vision\.cls_token$": "vision.embeddings.class_embedding",
    r"^vision\.pos_embed$": "vision.embeddings.position_embedding",
    r"^vision\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
    r"^vision\.blocks\.": "vision.encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"^vision\.norm\.": "vision.post_layernorm.",
}


class ImageRewardModel(nn.Module):
    """BLIP's two encoders, of options of their configurations, and the head: pixels [B, 3, h, w], tokens [B, L] -> scores [B]."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        from transformers import BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.configuration_blip import BlipTextConfig
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        special = {"bos_token_id": text["vocab_size"] - 2, "sep_token_id": None, "eos_token_id": None}
        config = BlipTextConfig(**text, **special, encoder_hidden_size=vision["hidden_size"], is_decoder=True, use_cache=False)
        self.vision: Any = BlipVisionModel(BlipVisionConfig(**vision))
        self.text: Any = BlipTextModel(config, add_pooling_layer=False)
        self.head = ScoreHead(config.hidden_size)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [B], standardised by the reference's mean and deviation."""
        picture = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=picture)
        return (self.head(read.last_hidden_state[:, 0]) - SCORE_MEAN) / SCORE_STD


class ImageReward(NeuralReward):
    """ImageReward: standardised, about -2.5 to 2. Differentiable.

    Args:
        model, tokenizer: the network, and BERT's tokenizer.
        options: as `NeuralReward`.
    """

    HUB_ID = "THUDM/ImageReward"
    FILE = "ImageReward.pt"
    CONFIG = (VIT_L_16, BERT_BASE)
    reads_prompts = True
    full_precision = "head"

    def __init__(self, model: ImageRewardModel, tokenizer: Any, **options: Unpack[ModelOptions]) -> None:
        preprocess = ImagePreprocessor.torchvision_clip(model.vision.config.image_size)
        super().__init__(model, preprocess, name="image_reward", **options)
        self.tokenizer = tokenizer
        self.prompt_cache = PromptCache(self._tokens)

    def conditions(self, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        """Tokens and mask, [B, 2, 35]."""
        return self.prompt_cache(prompts, self.parameter.device)

    def score(self, pixels: Tensor, conditions: Tensor | None) -> Tensor:
        assert conditions is not None
        return self.model(pixels, conditions[:, 0], conditions[:, 1])

    def _tokens(self, prompts: list[str]) -> Tensor:
        tokens = token_ids(self.tokenizer, prompts, PROMPT_TOKENS, pad_to_length=True)
        return torch.stack([tokens["input_ids"], tokens["attention_mask"]], 1)

    @classmethod
    def from_pretrained(
        cls, source: str | Path = HUB_ID, *, tokenizer: str | Path | None = None, **options: Unpack[ModelOptions]
    ) -> ImageReward:
        """Loads the published checkpoint into transformers' BLIP classes.

        Args:
            source: folder or hub id with ImageReward.pt, or the file itself.
            tokenizer: folder or hub id of BERT's; None: `source`, if it is a folder that has one, else google-bert/bert-base-uncased.
            options: as `NeuralReward`.

        Raises:
            WeightsError: something is missing, damaged, or not in BLIP's layout.
        """
        from transformers import BertTokenizer

        name = "image_reward"
        path = weights.find_file(source, name, cls.FILE)
        state = weights.rename(weights.read_state_dict(path, name), BLIP_NAMES)
        model = ImageRewardModel(*cls.CONFIG)
        weights.load_strictly(model, state, path, name, unused=UNUSED_KEYS)
        place = weights.companion(source, tokenizer, BERT, BERT_FILES)
        words = weights.load_tokenizer(BertTokenizer, place, name, model.text.config.vocab_size)
        return cls(model, words, **options)
