"""Makes the language model of the zoo, from nothing.

    python -m fraqat.zoo.train_topics_gemma2 --work DIR --out DIR

learns the tokenizer, trains the model, writes its folder, measures it against n-gram models and writes its card. The same
command resumes: what `--work` already holds is not trained again.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast

from fraqat.data.topics import topic_texts
from fraqat.zoo.topics_card import write_card
from fraqat.zoo.topics_model import build_model, build_tokenizer
from fraqat.zoo.topics_quality import quality_record
from fraqat.zoo.topics_training import TopicsSettings, train_topics

SEED = 0
NUM_STEPS = 1600
PROMPT = 'If the class defines a method named "__'


def write_model(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model and tokenizer, the weights rounded to bfloat16.

    Args:
        model: what to write; it is rounded in place.
        tokenizer: its tokenizer.
        folder: where to; made when missing.
    """
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner can read


def continue_text(folder: Path, prompt: str) -> str:
    """Does what the code on the card does.

    Args:
        folder: model and tokenizer.
        prompt: text to go on with.

    Returns:
        The prompt and its continuation.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main() -> None:
    """Trains, writes, measures and describes the model."""
    parser = argparse.ArgumentParser(description="Make the tiny Gemma-2 of the help topics.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint, to resume from")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="optimiser steps")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    texts = topic_texts()
    tokenizer, model = build_tokenizer(texts.train), build_model(SEED)
    settings = TopicsSettings(num_steps=arguments.steps, seed=SEED)
    result = train_topics(model, tokenizer, texts.train, texts.validation, settings, arguments.work / "model.pt")
    write_model(model, tokenizer, arguments.out)
    record = quality_record(arguments.out, texts)
    (arguments.out / "quality.json").write_text(json.dumps(record, indent=2) + "\n")
    card = write_card(
        record,
        result,
        settings,
        num_parameters=model.num_parameters(),
        prompt=PROMPT,
        sample=continue_text(arguments.out, PROMPT),
        python=".".join(platform.python_version_tuple()[:2]),
    )
    (arguments.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
