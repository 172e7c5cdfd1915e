"""The README's picture: first images of an evaluated run, one row per model, the same prompt and seed in a column.

python benchmarks/demo_picture.py runs/demo docs/images/demo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fraqat.workflows import RunFolder

CELL = 96
GAP = 6
LABEL_WIDTH = 110
HEAD_HEIGHT = 36


def draw(run: RunFolder) -> Image.Image:
    """Composes the picture from `RUN/images` and `RUN/evaluation.json`."""
    evaluation = json.loads(run.evaluation_path.read_text(encoding="utf-8"))
    labels = [row["model"] for row in evaluation["models"]]
    prompts = evaluation["prompts"]
    size = (LABEL_WIDTH + len(prompts) * (CELL + GAP), HEAD_HEIGHT + len(labels) * (CELL + GAP))
    picture = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for column, prompt in enumerate(prompts):
        words = prompt.removeprefix("a ").split(" on ")
        text = "\n".join([words[0], *(f"on {rest}" for rest in words[1:])])
        canvas.multiline_text((LABEL_WIDTH + column * (CELL + GAP), 2), text, fill="#333333", font=font, spacing=2)
    for row, label in enumerate(labels):
        top = HEAD_HEIGHT + row * (CELL + GAP)
        canvas.text((4, top + CELL // 2 - 8), label, fill="#111111", font=font)
        for column in range(len(prompts)):
            image = Image.open(run.samples_path / label / f"{column:02d}.png").resize(
                (CELL, CELL), Image.Resampling.NEAREST
            )
            picture.paste(image, (LABEL_WIDTH + column * (CELL + GAP), top))
    return picture


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(RunFolder.open(arguments.run)).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
