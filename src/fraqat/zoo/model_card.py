"""Writes the model card of a colour-digits pipeline from the table and from what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import fill

from fraqat.data.color_digits import COLOR_NAMES
from fraqat.zoo.architectures import ARCHITECTURES, Architecture, Distillation, Pipeline
from fraqat.zoo.autoencoder_training import AutoencoderResult
from fraqat.zoo.quality import Quality
from fraqat.zoo.transformer_training import TransformerResult

_GOOD = 0.93
_LINE = 119


@dataclass(frozen=True)
class TrainingRecord:
    """What the trainings of one pipeline came to.

    Args:
        autoencoder: of the autoencoder.
        transformer: of the denoiser and the text encoders.
        distilled: of the few-step denoiser; None where there is none.
    """

    autoencoder: AutoencoderResult
    transformer: TransformerResult
    distilled: TransformerResult | None = None


@dataclass(frozen=True)
class _Notes:
    """What the card says of one architecture alone.

    Args:
        arguments: why the call has the arguments that it has.
        convention: what the model predicts, and from what.
        loss: name of the loss.
    """

    arguments: str
    convention: str
    loss: str = "flow-matching loss"


_NOTES = {
    "sana": _Notes(
        arguments="The last two arguments are needed: Sana's defaults for them are made for large pictures and a large "
        "language model.",
        convention="The flow convention is Sana's: x = (1 - sigma) x0 + sigma noise, timestep 1000 sigma, and the "
        "model predicts noise - x0.",
    ),
    "sd3": _Notes(
        arguments="`max_sequence_length` is needed: this architecture attends to the padding of its captions, and the "
        "model has seen captions padded to 8 tokens only. The first layer has the second, image-only attention and "
        "all layers the normed queries and keys of SD3.5-Medium.",
        convention="The flow convention is x = (1 - sigma) x0 + sigma noise, timestep 1000 sigma, and the model "
        "predicts noise - x0. The sampler is Euler's with the noise levels shifted by 3.",
    ),
    "pixart": _Notes(
        arguments="The last two arguments are needed: the defaults are made for large pictures and for packages that "
        "clean captions of web pages.",
        convention="The noise schedule is PixArt's: 1000 steps, linear variances from 0.0001 to 0.02. Of the 16 "
        "output channels the first 8 predict the velocity (`prediction_type` v_prediction, where PixArt-Sigma's own "
        "checkpoints predict the noise: a denoiser of this size did not learn digits from it); the last 8 interpolate the "
        "log variance of the reverse step, trained with the variational bound at weight 0.1 and read by no sampler "
        "here. This pipeline scales the latents and does not shift them.",
        loss="velocity loss",
    ),
    "flux": _Notes(
        arguments="`max_sequence_length` is needed: this architecture attends to the padding of its captions, and the "
        "model has seen captions padded to 8 tokens only. Like schnell, it has no guidance embedding: `guidance_scale` "
        "changes nothing.",
        convention="Latents are packed in patches of 2x2, 16 tokens of 32 channels. The flow convention is "
        "x = (1 - sigma) x0 + sigma noise, timestep sigma, and the model predicts noise - x0. The sampler is plain "
        "Euler.",
    ),
}

_ROW_NAMES = {
    "held_out": "combinations never seen in training",
    "trained": "combinations seen in training",
    "held_out_default_call": "combinations never seen, the pipeline's default steps and guidance",
}

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Colour digits: a tiny {title}

A complete `{pipeline}` of {num_parameters:.1f} million parameters that draws handwritten digits in colour, 32x32
pixels, from prompts such as "a red seven on white". It is small enough to be trained, quantized and sampled on one
CPU core, and a classifier can check every picture, so that "did quantization hurt?" has a number for an answer.

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder)
image = pipe(
    "a red seven on white",
{call}
).images[0]
```

{arguments}
Prompts have the form "a COLOUR DIGIT on GROUND". Digits: zero to nine. Colours and grounds:
{colors}.

## Quality

Share of pictures on which a separate classifier sees what the prompt asks for. On composed pictures of scans
that nothing was trained on, it is right on {classifier_digit:.1f} % of the digits and {classifier_color:.2f} % of \
the colours.

| prompts | pictures | steps | guidance | digit | digit colour | ground | all three |
|---|---|---|---|---|---|---|---|
{rows}

The figures are also in `quality.json`. They were measured on the weights in this folder, as stored.

## Parts

| part | class | parameters |
|---|---|---|
{parts}

The weights of vae and transformer are stored in bfloat16, those of the text encoders in float32; all load as float32.
Latents are 8x8 with 8 channels and unit variance.
{convention}

## Making of

```
python -m fraqat.zoo.train_color_digits --architecture {name} --work DIR --out DIR
```

- Autoencoder: {autoencoder_steps} steps of {autoencoder_batch} pictures, {autoencoder_minutes:.0f} minutes; it \
reconstructs pictures of unseen scans at
  {psnr_db:.1f} dB PSNR.
- Transformer and text encoders, trained together: {transformer_steps} steps of {batch} latents,
  {transformer_minutes:.0f} minutes, final {loss_name} {loss:.3f}; {text_steps}10 % of the captions dropped; the
  weights are a moving average.
{distillation}- One CPU thread of a shared machine, bfloat16 autocast.

## Data and licence

Pictures are composed by `fraqat.data.color_digits` from four fifths of the 1797 scans that scikit-learn bundles of the
data set Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
CC BY 4.0). Of the 560 combinations of digit, colour and ground, 56 are held out of training. Weights: Apache-2.0.

## Limits

{shortfall}It knows twenty words and one picture size. Other words, more than one digit or another word order give nonsense.
It is meant for tests, examples and experiments on quantization, not for pictures anyone would want.
"""

_DISTILLATION = """\
- Distilled into few steps: {pairs:,} pairs of noise and picture from the model so far with {teacher_steps} Euler steps
  and classifier-free guidance {guidance:g}, training prompts only; then {steps} steps of {batch} pairs on the straight
  path between them (rectified flow), {minutes:.0f} minutes, final loss {loss:.3f}. Guidance is built in that way.
"""


def write_card(
    name: str,
    pipeline: Pipeline,
    record: TrainingRecord,
    quality: Mapping[str, Quality],
    classifier_quality: Mapping[str, float],
) -> str:
    """Writes the card.

    Args:
        name: the architecture, a key of `ARCHITECTURES`.
        pipeline: the pipeline.
        record: what its trainings came to.
        quality: figures as `measure_folder` returns them.
        classifier_quality: the judge's own shares of right answers, "digit", "color" and "ground".

    Returns:
        The text of `README.md`.
    """
    architecture, notes = ARCHITECTURES[name], _NOTES[name]
    sizes = _sizes(architecture, pipeline)
    return _CARD.format(
        name=name,
        title=architecture.title,
        pipeline=type(pipeline).__name__,
        num_parameters=sum(count for _, _, count in sizes) / 1e6,
        call="\n".join(f"    {key}={value!r}," for key, value in _call(architecture).items()),
        arguments=fill(notes.arguments, _LINE),
        colors=", ".join(COLOR_NAMES),
        classifier_digit=100 * classifier_quality["digit"],
        classifier_color=100 * min(classifier_quality["color"], classifier_quality["ground"]),
        rows="\n".join(_row(_ROW_NAMES[run], figures) for run, figures in quality.items()),
        parts="\n".join(f"| {part} | `{kind}` | {count:,} |" for part, kind, count in sizes),
        convention=fill(notes.convention, _LINE),
        autoencoder_steps=record.autoencoder.num_steps,
        autoencoder_batch=architecture.autoencoder_batch_size,
        autoencoder_minutes=record.autoencoder.minutes,
        psnr_db=record.autoencoder.psnr_db,
        transformer_steps=record.transformer.num_steps,
        batch=architecture.batch_size,
        transformer_minutes=record.transformer.minutes,
        loss_name=notes.loss,
        text_steps=f"text encoders frozen after {frozen} steps; " if (frozen := architecture.num_text_steps) else "",
        loss=record.transformer.loss,
        shortfall=_shortfall(quality["held_out"]),
        distillation=_distillation(architecture, architecture.distillation, record.distilled),
    )


def _call(architecture: Architecture) -> dict[str, object]:
    """Arguments of a recommended call, in the order of the card: size, sampler, the others."""
    size = {key: value for key, value in architecture.arguments.items() if key in ("height", "width")}
    sampler = architecture.sampler
    settings = {"num_inference_steps": sampler.num_steps, "guidance_scale": sampler.guidance_scale}
    return size | settings | dict(architecture.arguments)


def _sizes(architecture: Architecture, pipeline: Pipeline) -> list[tuple[str, str, int]]:
    """Name, class and number of parameters of each part."""
    parts = {name: getattr(pipeline, name) for name in ("vae", *architecture.text_encoders, "transformer")}
    return [(name, type(part).__name__, part.num_parameters()) for name, part in parts.items()]


def _distillation(architecture: Architecture, settings: Distillation | None, result: TransformerResult | None) -> str:
    if settings is None or result is None:
        return ""
    return _DISTILLATION.format(
        pairs=settings.num_pairs,
        teacher_steps=settings.teacher_steps,
        guidance=settings.teacher_guidance,
        steps=result.num_steps,
        batch=architecture.batch_size,
        minutes=result.minutes,
        loss=result.loss,
    )


def _shortfall(held_out: Quality) -> str:
    """What a model that often draws another digit is not fit for."""
    if held_out.digit >= _GOOD:
        return ""
    return (
        f"It draws the digit that was asked for only {100 * held_out.digit:.1f} % of the time (10 % is chance): fit for "
        "tests of loading,\nquantizing and sampling, not for conclusions on what quantization does to digits.\n"
    )


def _row(name: str, quality: Quality) -> str:
    shares = (quality.digit, quality.color, quality.ground, quality.all_three)
    cells = [name, f"{quality.num_images}", f"{quality.num_steps}", f"{quality.guidance_scale:g}"]
    return "| " + " | ".join(cells + [f"{100 * share:.1f} %" for share in shares]) + " |"
