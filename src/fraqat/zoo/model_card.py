"""Writes the model card of the colour-digits pipeline from what was measured."""

from collections.abc import Mapping

from fraqat.zoo.autoencoder_training import AutoencoderResult
from fraqat.zoo.quality import Quality, SamplerSettings
from fraqat.zoo.transformer_training import TransformerResult

_ROW_NAMES = {
    "held_out": "combinations never seen in training",
    "trained": "combinations seen in training",
    "held_out_default_call": "combinations never seen, the pipeline's default call",
}

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Colour digits: a tiny Sana

A complete `SanaPipeline` of {num_parameters:.1f} million parameters that draws handwritten digits in colour, 32x32
pixels, from prompts such as "a red seven on white". It is small enough to be trained, quantized and sampled on one
CPU core, and a classifier can check every picture, so that "did quantization hurt?" has a number for an answer.

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder)
image = pipe(
    "a red seven on white",
    height=32,
    width=32,
    num_inference_steps={num_steps},
    guidance_scale={guidance_scale},
    max_sequence_length=16,
    use_resolution_binning=False,
    complex_human_instruction=None,
).images[0]
```

The last two arguments are needed: Sana's defaults for them are made for large pictures and a large language model.
Prompts have the form "a COLOUR DIGIT on GROUND". Digits: zero to nine. Colours and grounds:
{colors}.

## Quality

Share of pictures on which a separate classifier sees what the prompt asks for. On composed pictures of scans
that nothing was trained on, it is right on {classifier_digit:.1f} % of the digits and {classifier_color:.2f} % of the colours.

| prompts | pictures | steps | guidance | digit | digit colour | ground | all three |
|---|---|---|---|---|---|---|---|
{rows}

The figures are also in `quality.json`. They were measured on the weights in this folder, as stored. Steps, guidance and
the scheduler's shift were chosen on 336 other pictures (other noise) of the never-seen combinations.

## Parts

| part | class | parameters |
|---|---|---|
{parts}

The weights of vae and transformer are stored in bfloat16, those of the text encoder in float32; all load as float32.
Latents are 8x8 with 8 channels and unit variance. The flow convention is Sana's: x = (1 - sigma) x0 + sigma noise,
timestep 1000 sigma, and the model predicts noise - x0.

## Making of

```
python -m fraqat.zoo.train_color_digits_sana --work DIR --out DIR
```

- Autoencoder: {autoencoder_steps} steps of 64 pictures, {autoencoder_minutes:.0f} minutes; it reconstructs pictures of
  unseen scans at {psnr_db:.1f} dB PSNR.
- Transformer and text encoder, trained together: {transformer_steps} steps of 64 latents,
  {transformer_minutes:.0f} minutes, final flow-matching loss {loss:.3f}; 10 % of the captions dropped; the weights
  are a moving average.
- One CPU thread of a shared machine, bfloat16 autocast.

## Data and licence

Pictures are composed by `fraqat.data.color_digits` from four fifths of the 1797 scans that scikit-learn bundles of the
data set Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
CC BY 4.0). Of the 560 combinations of digit, colour and ground, 56 are held out of training. Weights: Apache-2.0.

## Limits

It knows twenty words and one picture size. Other words, more than one digit or another word order give nonsense.
It is meant for tests, examples and experiments on quantization, not for pictures anyone would want.
"""


def write_card(
    autoencoder: AutoencoderResult,
    transformer: TransformerResult,
    quality: Mapping[str, Quality],
    num_parameters: Mapping[str, int],
    classifier_quality: Mapping[str, float],
    color_names: tuple[str, ...],
) -> str:
    """Writes the card.

    Args:
        autoencoder: what its training came to.
        transformer: what its training came to.
        quality: figures as `measure_folder` returns them.
        num_parameters: class name of each part -> number of parameters.
        classifier_quality: the judge's own shares of right answers, "digit", "color" and "ground".
        color_names: the colours that a prompt can name.

    Returns:
        The text of `README.md`.
    """
    sampler = SamplerSettings()
    return _CARD.format(
        num_parameters=sum(num_parameters.values()) / 1e6,
        num_steps=sampler.num_steps,
        guidance_scale=sampler.guidance_scale,
        colors=", ".join(color_names),
        classifier_digit=100 * classifier_quality["digit"],
        classifier_color=100 * min(classifier_quality["color"], classifier_quality["ground"]),
        rows="\n".join(_row(_ROW_NAMES[name], figures) for name, figures in quality.items()),
        parts="\n".join(f"| {_PART_NAMES[name]} | `{name}` | {count:,} |" for name, count in num_parameters.items()),
        autoencoder_steps=autoencoder.num_steps,
        autoencoder_minutes=autoencoder.minutes,
        psnr_db=autoencoder.psnr_db,
        transformer_steps=transformer.num_steps,
        transformer_minutes=transformer.minutes,
        loss=transformer.loss,
    )


_PART_NAMES = {
    "AutoencoderDC": "vae, 4x smaller to each side",
    "Gemma2Model": "text encoder, 2 layers of width 64",
    "SanaTransformer2DModel": "transformer, 3 layers of width 192",
}


def _row(name: str, quality: Quality) -> str:
    shares = (quality.digit, quality.color, quality.ground, quality.all_three)
    cells = [name, f"{quality.num_images}", f"{quality.num_steps}", f"{quality.guidance_scale:g}"]
    return "| " + " | ".join(cells + [f"{100 * share:.1f} %" for share in shares]) + " |"
