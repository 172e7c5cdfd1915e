"""Laws of prompt lists: every layout gives the same prompts, and the choice is the seed's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fraqat.data.prompts import PromptSpec, choose_prompts, load_prompts
from fraqat.errors import ConfigError

PROMPTS = tuple(f"a photo of thing {i}" for i in range(20))


def write(path: Path, layout: str) -> Path:
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    text = {
        "lines.txt": "\n".join((*PROMPTS[:3], "", *PROMPTS[3:])) + "\n",
        "list.json": json.dumps(PROMPTS),
        "rows.json": json.dumps(rows),
        "keyed.json": json.dumps({f"{i:040x}": {"category": "art", "prompt": p} for i, p in enumerate(PROMPTS)}),
        "texts.json": json.dumps({str(i): p for i, p in enumerate(PROMPTS)}),
        "column.json": json.dumps({"prompt": PROMPTS}),
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "table.csv": "id,prompt\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(PROMPTS)),
        "table.tsv": "\ufeffid\tprompt\n" + "".join(f"{i}\t{p}\n" for i, p in enumerate(PROMPTS)),
    }[layout]
    path.joinpath(layout).write_text(text, encoding="utf-8")
    return path / layout


LAYOUTS = (
    "lines.txt",
    "list.json",
    "rows.json",
    "keyed.json",
    "texts.json",
    "column.json",
    "rows.jsonl",
    "table.csv",
    "table.tsv",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_prompts_in_order(tmp_path: Path, layout: str) -> None:
    assert load_prompts(PromptSpec(str(write(tmp_path, layout)))) == PROMPTS


def test_the_choice_is_the_seeds_and_grows_at_its_end(tmp_path: Path) -> None:
    path = str(write(tmp_path, "lines.txt"))
    chosen = choose_prompts(PromptSpec(path), 8)
    assert choose_prompts(PromptSpec(path), 12)[:8] == chosen == choose_prompts(PromptSpec(path, seed=0), 8)
    assert choose_prompts(PromptSpec(path, seed=1), 8) != chosen != PROMPTS[:8]
    assert sorted(choose_prompts(PromptSpec(path), 20)) == sorted(PROMPTS)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    rows = str(write(tmp_path, "rows.jsonl"))
    (tmp_path / "bad.json").write_text('["a"')
    (tmp_path / "a.bin").touch()
    (tmp_path / "empty.txt").touch()
    for spec, message in (
        (PromptSpec(rows, column="caption"), "evaluation.prompts.column = 'caption' .* allowed is id, prompt"),
        (
            PromptSpec(str(tmp_path / "none.txt")),
            "evaluation.prompts.source = .*none.txt': there is no such file; .* has a.bin",
        ),
        (PromptSpec(str(tmp_path / "bad.json")), "bad.json is not JSON"),
        (PromptSpec(str(tmp_path / "a.bin")), "files of the types .json, .jsonl, .txt, .csv, .tsv"),
        (PromptSpec(str(tmp_path / "empty.txt")), "has no prompt in 'prompt'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_prompts(spec)
    with pytest.raises(ConfigError, match=r"evaluation.num_images = 21 .* at most the 20 prompts"):
        choose_prompts(PromptSpec(rows), 21)
