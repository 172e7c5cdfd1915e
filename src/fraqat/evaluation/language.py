"""How close a student's language is to the teacher's, and what it still knows: perplexity, KL, agreement, and lm-eval.

The only home of lm-eval, which is imported where it is used.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fraqat.distill import Batch, DistillTask
from fraqat.distill.next_token import logit_chunks, token_rows
from fraqat.errors import ConfigError, check_seed, config_error
from fraqat.evaluation.bootstrap import BootstrapSpec, Interval, ratio_interval
from fraqat.nn import STRICT_KEYS

PUBLISHED_TASKS = ("boolq", "commonsense_qa", "social_iqa", "wikitext")
"""lm-eval's names of the paper's three question sets, and of word perplexity; their data come from the hub."""


@dataclass(frozen=True)
class LanguageQuality:
    """A student's next-token distributions against the teacher's, over the same held-out tokens.

    Args:
        num_tokens: Predicted tokens.
        teacher_perplexity, student_perplexity: exp of the mean -log p(next token).
        kl: Mean KL(teacher || student) in nats.
        top1_agreement: Share, in [0, 1], of tokens where both find the same next token the most probable.
    """

    num_tokens: int
    teacher_perplexity: float
    student_perplexity: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class LmEvalSpec:
    """What lm-eval measures.

    Args:
        tasks: Names of lm-eval's tasks, or of tasks in `include_path`.
        include_path: Folder of further tasks as YAML files. Their data may be local files, and then nothing is downloaded. A
            task may name Python functions beside it, which are run: use folders that you trust.
        num_fewshot: Examples before each question; null leaves it to the task.
        limit: Questions of each task, from the first; null asks all.
        batch_size: Questions computed at a time.
        seed: Of the choice of examples.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    tasks: tuple[str, ...] = PUBLISHED_TASKS
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise config_error(f"lm_eval.{name}", value, allowed=f"{least} or more", fix=f"correct lm_eval.{name}")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise config_error(
                "lm_eval.include_path", self.include_path, allowed="a folder of task files", fix="correct the path"
            )
        check_seed("lm_eval.seed", self.seed)


@dataclass(frozen=True)
class LanguageRows:
    """The same by held-out row: sums over its predicted tokens, [number of rows] each, float64.

    Args:
        tokens: Predicted tokens.
        teacher_nats, student_nats: Of -log p(next token).
        kl: Of KL(teacher || student) in nats.
        agreed: Tokens where both find the same next token the most probable.
    """

    tokens: Tensor
    teacher_nats: Tensor
    student_nats: Tensor
    kl: Tensor
    agreed: Tensor

    def quality(self) -> LanguageQuality:
        """Over all tokens."""
        num = float(self.tokens.sum())
        return LanguageQuality(
            num_tokens=int(num),
            teacher_perplexity=math.exp(float(self.teacher_nats.sum()) / num),
            student_perplexity=math.exp(float(self.student_nats.sum()) / num),
            kl=float(self.kl.sum()) / num,
            top1_agreement=float(self.agreed.sum()) / num,
        )

    def intervals(self, spec: BootstrapSpec) -> dict[str, Interval]:
        """95 % intervals of `LanguageQuality`'s figures by name, over rows; empty where the spec asks for none.

        The tokens of one row depend on each other, so rows are drawn, and each figure is a ratio of their sums.
        """
        found: dict[str, Interval] = {}
        for name, sums in (
            ("teacher_perplexity", self.teacher_nats),
            ("student_perplexity", self.student_nats),
            ("kl", self.kl),
            ("top1_agreement", self.agreed),
        ):
            interval = ratio_interval(sums, self.tokens, spec)
            if interval is not None:
                is_perplexity = name.endswith("perplexity")
                found[name] = Interval(*map(math.exp, interval)) if is_perplexity else interval
        return found


class _Sums:
    """Sums by row of one batch."""

    def __init__(self, num_rows: int):
        self._values = torch.zeros(5, num_rows, dtype=torch.float64)

    def add(self, teacher_TV: Tensor, student_TV: Tensor, next_T: Tensor, row_T: Tensor) -> None:
        log_p_TV, log_q_TV = teacher_TV.log_softmax(-1), student_TV.log_softmax(-1)
        chosen = next_T[:, None]
        by_token = (
            torch.ones_like(next_T),
            -log_p_TV.gather(1, chosen)[:, 0],
            -log_q_TV.gather(1, chosen)[:, 0],
            ((log_p_TV - log_q_TV) * log_p_TV.exp()).double().sum(-1),
            log_p_TV.argmax(-1) == log_q_TV.argmax(-1),
        )
        self._values.index_add_(1, row_T.cpu(), torch.stack([values.double().cpu() for values in by_token]))

    def values(self) -> Tensor:
        return self._values


def language_quality(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Batch],
    task: DistillTask,
    *,
    chunk_tokens: int | None = None,
) -> LanguageQuality:
    """`language_rows` over all tokens."""
    return language_rows(teacher, student, batches, task, chunk_tokens=chunk_tokens).quality()


@torch.no_grad()
def language_rows(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Batch],
    task: DistillTask,
    *,
    chunk_tokens: int | None = None,
) -> LanguageRows:
    """Compares both models on held-out rows; the logits of only a chunk of tokens exist at a time.

    Args:
        teacher, student: Models in evaluation mode.
        batches: Token rows, such as `task.validation_batches(8)`.
        task: Gives the models' predictions.
        chunk_tokens: Tokens per chunk; None takes 2^26 logits.

    Raises:
        ConfigError: No token has a successor.
    """
    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        inputs = task.make_inputs(batch, generator)
        predictions = (task.predict(teacher, inputs), task.predict(student, inputs))
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        is_counted = torch.ones_like(tokens) if mask is None else mask.clone()
        is_counted[:, :-1] *= is_counted[:, 1:].clone()
        is_counted[:, -1] = 0
        rows = token_rows(predictions[0], is_counted)
        following = tokens.to(rows.device).flatten().roll(-1)
        sums = _Sums(len(tokens))
        for part, (teacher_TV, student_TV) in logit_chunks(predictions, rows, chunk_tokens):
            sums.add(teacher_TV, student_TV, following[part], part // tokens.shape[1])
        found.append(sums.values())
    together = torch.cat(found, 1) if found else torch.zeros(5, 0)
    if not together[0].any():
        raise config_error("batches", "no tokens", allowed="rows of two tokens or more", fix="give held-out text")
    return LanguageRows(*together)


def lm_eval_scores(model: nn.Module, tokenizer: Any, spec: LmEvalSpec | None = None) -> dict[str, dict[str, float]]:
    """Scores of a causal language model of transformers, quantized or not, by EleutherAI's lm-eval.

    Args:
        model: In evaluation mode, where it is to run.
        tokenizer: Of transformers.
        spec: Tasks; by default the paper's, whose data are downloaded.

    Returns:
        Task -> metric -> value, such as `acc` or `word_perplexity`, and `num_samples`.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    spec = spec or LmEvalSpec()
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"lm-eval is not installed ({error}): lm_eval needs it. Fix: pip install 'fraqat[language]'."
        ) from error
    manager = _task_manager(spec)
    make_harness: Any = HFLM
    with torch.random.fork_rng(), _quiet(), _explained(spec):
        output = simple_evaluate(
            make_harness(pretrained=model, tokenizer=tokenizer, batch_size=spec.batch_size),
            tasks=list(spec.tasks),
            task_manager=manager,
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=spec.seed,
            numpy_random_seed=spec.seed,
            torch_random_seed=spec.seed,
            fewshot_random_seed=spec.seed,
        )
    return _scores(output or {}, spec.tasks)


@contextmanager
def _explained(spec: LmEvalSpec) -> Generator[None]:
    """Says what to do where data cannot be had: the libraries' own errors derive from OSError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"lm_eval.tasks = {list(spec.tasks)}: the data cannot be had ({str(error).strip().splitlines()[0]}). Fix: "
            "connect to the network once, or use tasks with local data (lm_eval.include_path)."
        ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """lm-eval without progress bars, which would break into our own, and without its notes on every run."""
    from tqdm.std import tqdm

    bars: Any = tqdm
    log = logging.getLogger("lm_eval")
    level, start = log.level, bars.__init__
    bars.__init__ = lambda self, *values, **options: start(self, *values, **{**options, "disable": True})
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        bars.__init__ = start


def _task_manager(spec: LmEvalSpec) -> Any:
    """An index of tasks: of the given folder alone where that is enough, because lm-eval's own takes many seconds."""
    from lm_eval.tasks import TaskManager

    if spec.include_path is not None:
        local = TaskManager(include_path=spec.include_path, include_defaults=False)
        if all(task in local.all_tasks for task in spec.tasks):
            return local
    manager = TaskManager(include_path=spec.include_path)
    unknown = [task for task in spec.tasks if task not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"names of lm-eval's tasks{', such as ' + ', '.join(near) if near else ''}"
        raise config_error(
            "lm_eval.tasks", unknown[0], allowed=hint, fix="correct the name, or set lm_eval.include_path"
        )
    return manager


def _scores(output: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics by name; lm-eval writes `metric,filter`, and the filter `none` goes without saying."""
    scores: dict[str, dict[str, float]] = {}
    for task in (*tasks, *(name for name in output["results"] if name not in tasks)):
        found = output["results"].get(task, {})
        values = {
            name.removesuffix(",none"): float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and "_stderr" not in name and "," in name
        }
        counted = output.get("n-samples", {}).get(task)
        scores[task] = values | ({"num_samples": float(counted["effective"])} if counted else {})
    return scores
