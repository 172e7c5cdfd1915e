"""Writes the model card of the zoo's language model from what was measured."""

from collections.abc import Mapping
from typing import Any

from fraqat.data.topics import HELD_OUT_TOPICS, VALIDATION_TOPICS
from fraqat.zoo.topics_training import TopicsResult, TopicsSettings

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Help topics: a tiny Gemma-2

A complete `Gemma2ForCausalLM` of {num_parameters:.2f} million parameters, with its tokenizer, that has read the help topics of
Python (`pydoc_data.topics`, what `help("with")` shows). It is small enough to be trained, quantized and measured on one CPU
core, and it was truly trained: it predicts text that it has never seen better than the best n-gram model of the same text.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer({prompt!r}, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
text = tokenizer.decode(tokens[0], skip_special_tokens=True)
```

which gives

```text
{sample}
```

## Quality

On {num_bytes:,} bytes ({num_tokens:,} tokens) of held-out text. Perplexity is per token of this model's tokenizer, the same
tokens for both rows that have one; bits per byte compare all rows.

| model | perplexity | bits per byte |
|---|---|---|
| this model, windows of 256 tokens that overlap by half | {model_perplexity:.2f} | {model_bits:.3f} |
| {token_order}-gram model of the tokens | {token_perplexity:.2f} | {token_bits:.3f} |
| {byte_order}-gram model of the bytes | - | {byte_bits:.3f} |

Bits per byte, topic by topic:

| topic | this model | tokens, {token_order}-gram | bytes, {byte_order}-gram |
|---|---|---|---|
{topic_rows}

The n-gram models are interpolated modified Kneser-Ney models (Chen and Goodman, 1999; `fraqat.zoo.ngram`) of the same
training text, of the order that is best on the validation text. The figures are also in `quality.json`. They were measured
on the weights in this folder, as stored, computed in float32.

## Parts

Four layers of width 192 with 4 query and 2 key-value heads of width 48, feed-forward width 512, every second layer with a
sliding window of 128 tokens; tied embeddings; attention softcap 50, logit softcap 30. Byte-level BPE of 1024 tokens, `<bos>`
first. Weights are stored in bfloat16.

## Making of

```
python -m fraqat.zoo.train_topics_gemma2 --work DIR --out DIR
```

{num_steps} steps of {batch_size} rows of {row_tokens} tokens, bfloat16 autocast, {minutes:.0f} minutes on a part of one core;
{num_training_tokens:,} training tokens. Against learning by heart: dropout {dropout:g}, {merge_dropout:g} of the BPE merges
left out at random, weight decay {weight_decay:g}, averaged weights, and the validation text chose the step that was kept
(validation loss {validation_nats:.3f} nats per token).

## Data and licence

The text of `pydoc_data.topics` of Python {python}, a part of Python's documentation, copyright Python Software Foundation,
PSF License Agreement. Topics held out of training: {held_out}. Validation: {validation}.
The topics quote each other: every paragraph is used once, and paragraphs of these topics are left out where more than 30 % of
their runs of five words are in the training text (`fraqat.data.topics`). Weights: Apache-2.0.

## Limits

It knows one third of a megabyte of text about Python and no facts: what it writes looks like documentation and is mostly
wrong. It is meant for tests, examples and experiments on quantization.
"""


def write_card(
    record: Mapping[str, Any],
    result: TopicsResult,
    settings: TopicsSettings,
    *,
    num_parameters: int,
    prompt: str,
    sample: str,
    python: str,
) -> str:
    """Writes the card.

    Args:
        record: figures as `quality_record` returns them.
        result: what the training came to.
        settings: how it was done.
        num_parameters: of the model.
        prompt: an example.
        sample: what the code on the card gives for it.
        python: version of Python whose text was read.

    Returns:
        The text of `README.md`.
    """
    model, token, byte = (record[name] for name in ("model", "token_ngram", "byte_ngram"))
    rows = [
        f"| {name} | " + " | ".join(f"{part['topic_bits_per_byte'][name]:.3f}" for part in (model, token, byte)) + " |"
        for name in HELD_OUT_TOPICS
    ]
    return _CARD.format(
        num_parameters=num_parameters / 1e6,
        prompt=prompt,
        sample=sample,
        num_bytes=record["num_bytes"],
        num_tokens=record["num_tokens"],
        num_training_tokens=record["num_training_tokens"],
        model_perplexity=model["perplexity"],
        model_bits=model["bits_per_byte"],
        token_order=token["order"],
        token_perplexity=token["perplexity"],
        token_bits=token["bits_per_byte"],
        byte_order=byte["order"],
        byte_bits=byte["bits_per_byte"],
        topic_rows="\n".join(rows),
        num_steps=result.num_steps,
        minutes=result.minutes,
        validation_nats=result.validation_nats,
        batch_size=settings.batch_size,
        row_tokens=settings.row_tokens,
        dropout=settings.dropout,
        merge_dropout=settings.merge_dropout,
        weight_decay=settings.weight_decay,
        python=python,
        held_out=", ".join(HELD_OUT_TOPICS),
        validation=", ".join(VALIDATION_TOPICS),
    )
