"""Laws of the language measures, and lm-eval on local tasks without a network."""

from __future__ import annotations

import builtins
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fraqat.data.topics_tasks import CHOICE_TASK, WORDS_TASK, write_topics_tasks
from fraqat.errors import ConfigError
from fraqat.evaluation.language import PUBLISHED_TASKS, LmEvalSpec, language_quality, language_rows, lm_eval_scores

pytestmark = pytest.mark.xdist_group("lm-eval")  # one worker loads tasks and model

VOCABULARY = 20


class Bigrams(nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.states = nn.Embedding(VOCABULARY, 8, _weight=torch.randn(VOCABULARY, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        return F.linear(self.states(tokens), self.head).log_softmax(-1)


class BigramTask:
    """The part of a task that the measures use."""

    def make_inputs(self, batch: Any, generator: torch.Generator) -> Any:
        return batch

    def predict(self, model: Bigrams, inputs: Any) -> dict[str, Tensor]:
        return {"hidden": model.states(inputs["input_ids"]), "head": model.head}


def batches(is_masked: bool = False) -> list[dict[str, Tensor]]:
    tokens = torch.randint(VOCABULARY, (5, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    mask[3, :2] = 0
    columns = {"input_ids": tokens, **({"attention_mask": mask} if is_masked else {})}
    return [{name: value[start : start + 2] for name, value in columns.items()} for start in range(0, 5, 2)]


@pytest.mark.parametrize("is_masked", [False, True])
def test_measures_are_the_means_over_predicted_tokens(is_masked: bool) -> None:
    teacher, student = Bigrams(0), Bigrams(1)
    found = language_quality(teacher, student, batches(is_masked), BigramTask(), chunk_tokens=3)  # type: ignore[arg-type]
    nats = {"teacher": 0.0, "student": 0.0}
    kl, agreed, count = 0.0, 0, 0
    for batch in batches(is_masked):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for row, keep in zip(batch["input_ids"], mask, strict=True):
            for place in range(6):
                if not (keep[place] and keep[place + 1]):
                    continue
                log_p, log_q = (model.log_probabilities(row[place]) for model in (teacher, student))
                nats["teacher"] -= log_p[row[place + 1]].item()
                nats["student"] -= log_q[row[place + 1]].item()
                kl += (log_p.exp() * (log_p - log_q)).sum().item()
                agreed += int(log_p.argmax() == log_q.argmax())
                count += 1
    assert found.num_tokens == count
    assert found.teacher_perplexity == pytest.approx(math.exp(nats["teacher"] / count), rel=1e-5)
    assert found.student_perplexity == pytest.approx(math.exp(nats["student"] / count), rel=1e-5)
    assert found.kl == pytest.approx(kl / count, rel=1e-5)
    assert found.top1_agreement == pytest.approx(agreed / count)


@pytest.mark.parametrize("is_masked", [False, True])
def test_rows_are_what_each_row_alone_gives(is_masked: bool) -> None:
    teacher, student = Bigrams(0), Bigrams(1)
    found = language_rows(teacher, student, batches(is_masked), BigramTask(), chunk_tokens=4)  # type: ignore[arg-type]
    rows = [
        {name: values[i : i + 1] for name, values in batch.items()}
        for batch in batches(is_masked)
        for i in range(len(batch["input_ids"]))
    ]
    assert len(found.tokens) == len(rows) == 5
    for i, row in enumerate(rows):
        alone = language_quality(teacher, student, [row], BigramTask())  # type: ignore[arg-type]
        num = alone.num_tokens
        assert found.tokens[i] == num
        assert float(found.teacher_nats[i]) == pytest.approx(num * math.log(alone.teacher_perplexity), rel=1e-5)
        assert float(found.student_nats[i]) == pytest.approx(num * math.log(alone.student_perplexity), rel=1e-5)
        assert float(found.kl[i]) == pytest.approx(num * alone.kl, rel=1e-5)
        assert float(found.agreed[i]) == pytest.approx(num * alone.top1_agreement)


def test_a_model_agrees_with_itself() -> None:
    found = language_quality(Bigrams(0), Bigrams(0), batches(), BigramTask())  # type: ignore[arg-type]
    assert found.top1_agreement == 1.0
    assert abs(found.kl) < 1e-7
    assert found.student_perplexity == found.teacher_perplexity


def test_rows_of_one_token_are_refused() -> None:
    with pytest.raises(ConfigError, match="batches = 'no tokens'"):
        language_quality(Bigrams(0), Bigrams(0), [{"input_ids": torch.ones(2, 1).long()}], BigramTask())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limit": 0}, r"lm_eval\.limit = 0"),
        ({"num_fewshot": -1}, r"lm_eval\.num_fewshot = -1"),
        ({"include_path": "nowhere"}, r"lm_eval\.include_path = 'nowhere' .* a folder of task files"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LmEvalSpec(**values)


def test_without_lm_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'fraqat\[language\]'"):
        lm_eval_scores(nn.Linear(1, 1), None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval") / "tasks"
    write_topics_tasks(folder, num_questions=24)
    words = folder / f"{WORDS_TASK}.jsonl"
    texts = [json.loads(line)["text"] for line in words.read_text().splitlines()]
    words.write_text("".join(json.dumps({"text": text[:300]}) + "\n" for text in texts))  # one window of the teacher
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and the cache of prepared data in a place of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    import transformers

    from fraqat.zoo import zoo_path

    folder = zoo_path("topics-gemma2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.usefixtures("offline")
def test_local_tasks_are_scored_offline(
    tasks: Path, teacher: tuple[Any, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = teacher
    spec = LmEvalSpec(tasks=(CHOICE_TASK, WORDS_TASK), include_path=str(tasks), limit=12, batch_size=4)
    state = torch.get_rng_state()
    scores = lm_eval_scores(model, tokenizer, spec)
    assert capfd.readouterr().err == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert set(scores) == {CHOICE_TASK, WORDS_TASK}
    assert scores[CHOICE_TASK]["num_samples"] == 12
    assert scores[CHOICE_TASK]["acc"] == pytest.approx(choice_accuracy(model, tokenizer, tasks, 12))
    assert scores[CHOICE_TASK]["acc"] > 0.4
    assert scores[WORDS_TASK]["word_perplexity"] == pytest.approx(
        word_perplexity(model, tokenizer, tasks, 12), rel=1e-3
    )


def choice_accuracy(model: Any, tokenizer: Any, folder: Path, limit: int) -> float:
    hits = 0
    for line in (folder / f"{CHOICE_TASK}.jsonl").read_text().splitlines()[:limit]:
        question = json.loads(line)
        scores = []
        for choice in question["choices"]:
            context = tokenizer(question["context"])["input_ids"]
            whole = tokenizer(question["context"] + choice)["input_ids"]
            scores.append(-nats_of(model, whole, len(context)))
        hits += int(max(range(4), key=scores.__getitem__) == question["answer"])
    return hits / limit


def word_perplexity(model: Any, tokenizer: Any, folder: Path, limit: int) -> float:
    lines = (folder / f"{WORDS_TASK}.jsonl").read_text().splitlines()[:limit]
    texts = [json.loads(line)["text"] for line in lines]
    start = tokenizer.bos_token_id  # lm-eval predicts the tokenizer's own too
    nats = sum(nats_of(model, [start, *tokenizer(text)["input_ids"]], 1) for text in texts)
    return math.exp(nats / sum(len(re.split(r"\s+", text)) for text in texts))


@torch.no_grad()
def nats_of(model: Any, tokens: list[int], first: int) -> float:
    row = torch.tensor([tokens])
    nats = F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="none")
    return nats[first - 1 :].sum().item()


@pytest.mark.usefixtures("offline")
def test_missing_data_say_what_to_do(tasks: Path, teacher: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    task = json.loads((tasks / f"{WORDS_TASK}.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "broken.yaml").write_text(json.dumps({**task, "task": "broken"}))
    spec = LmEvalSpec(tasks=("broken",), include_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"lm_eval\.tasks = \['broken'\]: the data cannot be had .*gone\.jsonl"):
        lm_eval_scores(*teacher, spec)


@pytest.mark.slow
def test_the_published_tasks_exist_and_an_unknown_one_is_named() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match=r"lm_eval\.tasks = 'commonsense_qna' .* such as .*commonsense_qa"):
        lm_eval_scores(nn.Linear(1, 1), None, LmEvalSpec(tasks=(*PUBLISHED_TASKS, "commonsense_qna")))
