"""Does llama.cpp compute what the student computes? The tiny Gemma-2 as GGUF Q4_0, in a real llama.cpp.

Quantizes the model that comes with the package without training, writes it as GGUF, and compares on held-out texts: the
tokenizer, the logits of every position, and a greedy continuation. llama-cpp-python may lie in another environment:

    python benchmarks/llama_cpp_logits.py --llama-python LLAMA_VENV/bin/python --out docs/results/llama_cpp.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, __version__, quantize_
from fraqat.export.gguf import FILE, GgufTarget
from fraqat.export.target import ExportJob, ModelDescription, Part
from fraqat.numerics import Granularity, RangeMethod
from fraqat.table import Table
from fraqat.zoo import zoo_path

TEXTS = (
    "The if statement is used for conditional execution: it selects exactly one of the suites by evaluating the expressions",
    "The for statement is used to iterate over the elements of a sequence (such as a string, tuple or list)",
    "A class definition is an executable statement. The inheritance list usually gives a list of base classes",
    "Functions may be decorated by one or more decorator expressions, which are evaluated when the function is defined",
)
NUM_START, NUM_NEW = 8, 40
WORKER = """
import json, sys
import numpy as np
import llama_cpp
from llama_cpp import Llama
job = json.load(open(sys.argv[1]))
model = Llama(job["model"], n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False)
logits, found = [], {"version": llama_cpp.__version__, "tokens": [], "greedy": [], "text": []}
for text, ids in zip(job["texts"], job["ids"]):
    found["tokens"].append(model.tokenize(text.encode(), add_bos=True))
    model.reset()
    model.eval(ids)
    logits.append(np.array(model.scores[: len(ids)]))
    model.reset()
    model.eval(ids[: job["num_start"]])
    new = []
    for _ in range(job["num_new"]):
        new.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(new[-1:])
    found["greedy"].append(new)
    found["text"].append(model.detokenize(new).decode(errors="replace"))
np.save(job["out"] + ".npy", np.concatenate(logits))
json.dump(found, open(job["out"], "w"))
"""


class Logits(nn.Module):
    """The language model as a part."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1, T] -> [1, T, V]."""
        return self.model(input_ids=input_ids).logits


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise."""
    noise = float((reference.double() - value.double()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(reference.double().square().sum()) / noise)


def student_of(folder: Path) -> Any:
    """The tiny Gemma-2 on the target's grid, untrained."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight = WeightSpec(
        granularity=Granularity.GROUP, group_size=32, scale_dtype="float16", range_method=RangeMethod.MSE
    )
    quantize_(model, QuantSpec(weight, ActivationSpec()), rules=[LayerRule(pattern="lm_head", skip=True)])
    return model.eval()


def in_llama_cpp(python: str, model: Path, ids: list[list[int]], folder: Path) -> tuple[dict[str, Any], Tensor]:
    """What a real llama.cpp gives: texts and tokens, and the logits of all positions."""
    job = {"model": str(model), "texts": TEXTS, "ids": ids, "num_start": NUM_START, "num_new": NUM_NEW}
    job_path, out = folder / "job.json", folder / "found.json"
    job_path.write_text(json.dumps(job | {"out": str(out)}), encoding="utf-8")
    subprocess.run([python, "-c", WORKER, str(job_path)], check=True)
    return json.loads(out.read_text(encoding="utf-8")), torch.from_numpy(np.load(f"{out}.npy"))


@torch.no_grad()
def greedy(model: nn.Module, ids: list[int]) -> list[int]:
    """A continuation of the first tokens."""
    tokens = ids[:NUM_START]
    for _ in range(NUM_NEW):
        tokens = [*tokens, int(model(torch.tensor([tokens]))[0, -1].argmax())]
    return tokens[NUM_START:]


@torch.no_grad()
def compare(python: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    from transformers import AutoTokenizer

    origin = zoo_path("topics-gemma2")
    student = student_of(origin)
    tokenizer: Any = AutoTokenizer.from_pretrained(origin)
    ids: list[list[int]] = [tokenizer(text).input_ids for text in TEXTS]
    target = GgufTarget()
    description = ModelDescription(type(student).__name__, student.config.to_dict(), "zoo:topics-gemma2")
    target.write(ExportJob(student, lambda: (), description, origin, folder))
    found, theirs = in_llama_cpp(python, folder / FILE, ids, folder)
    logits = Logits(student)
    part = Part("language_model", logits, ("logits",), lambda: (), {})
    opened = target.open(folder, student)
    ours = torch.cat([logits(torch.tensor([row]))[0] for row in ids])
    simulated = torch.cat([opened.run(part, {"input_ids": torch.tensor([row])}).outputs["logits"][0] for row in ids])
    same = [greedy(logits, row) == other for row, other in zip(ids, found["greedy"], strict=True)]
    return {
        "llama_cpp_python": found["version"],
        "positions": len(theirs),
        "tokenizer_equal": found["tokens"] == ids,
        "sqnr_db": sqnr_db(ours, theirs),
        "sqnr_db_opened_file_to_llama_cpp": sqnr_db(simulated, theirs),
        "sqnr_db_student_to_opened_file": sqnr_db(ours, simulated),
        "same_first_choice": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "greedy_equal": f"{sum(same)} of {len(same)}",
        "example": tokenizer.decode(ids[0][:NUM_START]) + " | " + found["text"][0],
        "fraqat": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments.llama_python, Path(folder))
    print(Table("The student in llama.cpp", ("figure", "value"), tuple(result.items())))
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
