"""Causal language models of transformers; head and embeddings stay in floating point."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fraqat.config import ORIGINAL, LanguageRecipe, Recipe
from fraqat.data.text import load_text
from fraqat.evaluation.language import language_rows, lm_eval_scores
from fraqat.export import Inputs, ModelDescription, Part
from fraqat.nn import LayerFamilies, LayerRule
from fraqat.planning import Workload
from fraqat.workflows.progress import Progress
from fraqat.workflows.sessions.base import Measurement, QualityColumn, Session, description_of

NUM_SHOWN = 4
_PROMPT_TOKENS = 24
_GRAPH_BATCH = 2
_TOKENIZER_FILE = "tokenizer.json"


class LanguageSession(Session[LanguageRecipe]):
    """A language recipe in memory."""

    sample_suffix = ".txt"

    def load_model(self, dtype: torch.dtype) -> nn.Module:
        """The whole model."""
        from fraqat.tasks.language import load_language_model

        return load_language_model(self.model_spec, dtype=dtype)[0]

    def build_float(self, class_name: str, config: dict[str, Any]) -> nn.Module:
        """An untrained model."""
        from fraqat.tasks.language import build_language_model

        return build_language_model(class_name, config)

    @cached_property
    def _parts(self) -> tuple[LayerFamilies, tuple[LayerRule, ...]]:
        from fraqat.tasks.language_layers import head_rules, language_families

        model = self.known.build()
        return language_families(model), head_rules(model)

    @property
    def families(self) -> LayerFamilies:
        """Found by the structure of the model."""
        return self._parts[0]

    @property
    def family_rules(self) -> tuple[LayerRule, ...]:
        """The head is left out."""
        return self._parts[1]

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from fraqat.tasks.language import load_tokenizer

        return load_tokenizer(self.model_spec)

    @cached_property
    def task(self) -> Any:
        """Token rows and the distributions that are distilled."""
        from fraqat.tasks.language import LanguageTask

        tokenizer = self.tokenizer
        source = load_text(
            self.recipe.data,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            bos_token_id=tokenizer.bos_token_id,
        )
        return LanguageTask(self.teacher, source, self.recipe.language)

    def workload(self, recipe: Recipe) -> Workload:
        """One step on token rows."""
        from fraqat.tasks.language import LanguageTask

        student = self.planned_student(recipe)
        task = LanguageTask(student, cast(Any, None), self.recipe.language)
        length = self.recipe.data.sequence_length
        return Workload(
            student,
            task.predict,
            lambda num: {"input_ids": torch.zeros(num, length, dtype=torch.int64, device="meta")},
            loss=lambda ours, theirs, inputs: task.loss(ours, theirs, inputs, recipe.train.losses),
            teacher_dtype=recipe.model.dtype,
            constant_outputs=task.constant_outputs,
        )

    def evaluator(self, num_samples: int | None) -> LanguageEvaluator:
        """Reads held-out text."""
        return LanguageEvaluator(self, num_samples or self.recipe.evaluation.num_sequences)

    def generate(
        self,
        model: nn.Module,
        prompts: tuple[str, ...],
        *,
        seed: int,
        on_done: Callable[[int], None] = lambda num_done: None,
    ) -> list[bytes]:
        """Continuations as UTF-8 texts, each token the most probable one."""
        from fraqat.tasks.language import generate_text

        texts: list[bytes] = []
        for prompt in prompts:
            tokens = self.recipe.evaluation.max_new_tokens
            texts.append(generate_text(model, self.tokenizer, [prompt], max_new_tokens=tokens, seed=seed)[0].encode())
            on_done(len(texts))
        return texts

    def description(self) -> ModelDescription:
        """How to build the model again."""
        config = cast(Any, self.teacher).config.to_dict()
        return description_of(self.recipe.model, type(self.teacher).__name__, config)

    def export_parts(self, student: nn.Module) -> tuple[Part, ...]:
        """The model with its key-value cache as inputs and outputs."""
        from fraqat.tasks.language_parts import LanguageStep, stop_tokens
        from fraqat.tasks.tokenizer_files import tokenizer_json

        step = LanguageStep(student)
        num_samples = self.recipe.train.calibration_samples

        def batches() -> list[Inputs]:
            found = self.task.calibration_batches(num_samples, _GRAPH_BATCH)
            lengths = [len(batch["input_ids"][0]) for batch in found]
            return [step.inputs_after(b["input_ids"], n // 2) for b, n in zip(found, lengths, strict=True)]

        constants = {
            "tokenizer": _TOKENIZER_FILE,
            "stop_tokens": stop_tokens(student, self.tokenizer),
            "max_new_tokens": self.recipe.evaluation.max_new_tokens,
        }
        files = {_TOKENIZER_FILE: tokenizer_json(self.tokenizer).encode()}
        return (Part("model", step, step.outputs, batches, step.dynamic_axes(), constants, files),)

    def original_files(self) -> list[Path]:
        """The model's weight files."""
        from fraqat.tasks.loading import weight_files

        folder = Path(self.model_spec.source)
        files = weight_files(folder, self.model_spec.variant) if folder.is_dir() else []
        return [path for path in files if path.name.startswith("model")]


_COLUMNS = (
    QualityColumn("perplexity", "perplexity", decimals=2),
    QualityColumn("kl", "KL to original, nats"),
    QualityColumn("top1_agreement", "same first choice, %", 100, 1),
)


_METRICS = ("acc_norm", "acc", "word_perplexity")
"""Of lm-eval's metrics, the one that the table shows: the first that a task has."""


def _score_column(task: str) -> QualityColumn:
    is_perplexity = task.startswith("wikitext") or task.endswith(("perplexity", "_words"))
    return (
        QualityColumn(task, f"{task}, word perplexity") if is_perplexity else QualityColumn(task, f"{task}, %", 100, 1)
    )


class LanguageEvaluator:
    """Compares next-token distributions on held-out text, and scores of benchmarks.

    Args:
        session: Gives text and tokenizer.
        num_sequences: Rows of tokens per model, at most the held-out ones.
    """

    sample_suffix = ".txt"

    def __init__(self, session: LanguageSession, num_sequences: int):
        self._session, self._spec = session, session.recipe.evaluation
        size = self._spec.batch_size
        self._batches = session.task.validation_batches(size)[: -(-num_sequences // size)]
        self.shown_prompts = self._spec.prompts[:NUM_SHOWN] or self._beginnings()
        tasks = self._spec.lm_eval.tasks if self._spec.lm_eval else ()
        self.columns = (*_COLUMNS, *(_score_column(name) for name in tasks))
        num = sum(len(batch["input_ids"]) for batch in self._batches)
        self.notes = (
            f"{num} held-out rows of {session.recipe.data.sequence_length} tokens: perplexity per token; KL(original || model) "
            "of the next token, mean; share of tokens where both models' most probable token is the same.",
        )

    def measure(self, label: str, model: nn.Module, progress: Progress) -> Measurement:
        """Reads the held-out rows with one model, and continues the shown prompts."""
        progress.count(f"reading with {label}", 0, len(self._batches))
        task, teacher = self._session.task, self._session.teacher
        rows = language_rows(teacher, model, self._batches, task)
        found, intervals = rows.quality(), rows.intervals(self._spec.bootstrap)
        is_original = label == ORIGINAL
        quality: dict[str, float | None] = {
            "perplexity": found.student_perplexity,
            "kl": None if is_original else found.kl,
            "top1_agreement": None if is_original else found.top1_agreement,
        }
        if self._spec.lm_eval is not None:
            scores = lm_eval_scores(model, self._session.tokenizer, self._spec.lm_eval)
            quality |= {
                name: next((values[m] for m in _METRICS if m in values), None) for name, values in scores.items()
            }
        samples = self._session.generate(model, self.shown_prompts, seed=0)
        measured = {"perplexity": "student_perplexity"}
        if not is_original:
            measured |= {"kl": "kl", "top1_agreement": "top1_agreement"}
        shown = {key: intervals[name] for key, name in measured.items() if name in intervals}
        return Measurement(quality, tuple(samples), shown)

    def _beginnings(self) -> tuple[str, ...]:
        rows = [row for batch in self._batches for row in batch["input_ids"]][:NUM_SHOWN]
        decode = self._session.tokenizer.decode
        return tuple(str(decode(row[:_PROMPT_TOKENS], skip_special_tokens=True)) for row in rows)
