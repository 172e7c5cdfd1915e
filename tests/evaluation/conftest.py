"""A tiny CLIP with random weights and its tokenizer, in a folder."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 32 x 32, texts of 20 tokens, 12 features."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    letters = list(string.ascii_lowercase + ".,")
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 12}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    texts = {"vocab_size": len(tokens), "num_hidden_layers": 2, "max_position_embeddings": 20}
    images = {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config={**sizes, **texts, **ends}, vision_config={**sizes, **images}, projection_dim=12
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    tokens_of_one = transformers.CLIPTokenizer.from_pretrained(folder)("a red one", return_tensors="pt")
    with torch.no_grad():
        grey = model.eval()(pixel_values=torch.zeros(1, 3, 32, 32), **tokens_of_one)
        model.text_projection.weight *= grey.logits_per_image.sign()  # so that the score of "a red one" is above 0
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
    return folder
