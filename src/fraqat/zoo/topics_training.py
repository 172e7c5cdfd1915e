"""Trains the language model of the zoo on a third of a megabyte: what keeps it from learning the text by heart is here."""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fraqat.zoo.merge_dropout import MergeDropout

_PRINT_EVERY = 25
_BETAS = (0.9, 0.98)
_STEPS_PER_SPLIT = 50
_SEED_STRIDE = 100_003


@dataclass(frozen=True)
class TopicsSettings:
    """How the model is trained.

    Args:
        num_steps: optimiser steps.
        batch_size: rows per step.
        row_tokens: tokens per row.
        learning_rate: peak, reached after `num_warmup_steps`, then cosine decay to a fiftieth of it.
        num_warmup_steps: steps of linear warmup.
        weight_decay: of all matrices.
        dropout: share of features dropped after the embedding and after every attention and feed-forward part.
        merge_dropout: share of BPE merges left out in the training text; see `MergeDropout`.
        ema_decay: of the averaged weights, which are the ones that are kept.
        evaluate_every: steps between two looks at the validation text, where the checkpoint is written too.
        patience: looks without a better one before training stops.
        seed: seed of rows, merges and dropout.
    """

    num_steps: int
    batch_size: int = 8
    row_tokens: int = 256
    learning_rate: float = 2e-3
    num_warmup_steps: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.2
    merge_dropout: float = 0.1
    ema_decay: float = 0.99
    evaluate_every: int = 100
    patience: int = 6
    seed: int = 0


@dataclass(frozen=True)
class TopicsResult:
    """What the training came to.

    Args:
        num_steps: optimiser steps until the weights that were kept.
        minutes: wall-clock time of the whole training, over all resumptions.
        validation_nats: mean negative log probability of a validation token under the weights that were kept.
    """

    num_steps: int
    minutes: float
    validation_nats: float


class _Run:
    """Everything that a checkpoint holds, and one optimiser step on it."""

    def __init__(self, model: PreTrainedModel, settings: TopicsSettings) -> None:
        self.model, self.settings = model, settings
        self.average = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.best = {name: value.clone() for name, value in self.average.items()}
        self.best_nats, self.best_step = math.inf, 0
        matrices = [value for value in model.parameters() if value.ndim > 1]
        vectors = [value for value in model.parameters() if value.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=_BETAS, fused=True)
        self.step, self.minutes = 0, 0.0

    def train_step(self, rows: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(self.settings, self.step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=rows, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.settings.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                self.average[name].lerp_(value, 1 - decay)
        return loss.item()

    @contextmanager
    def averaged(self) -> Generator[None]:
        """The model with the averaged weights while the block runs."""
        own = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.model.load_state_dict(self.average, strict=False)
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)

    @property
    def is_stale(self) -> bool:
        """Whether the last looks at the validation text brought nothing better."""
        return self.step - self.best_step >= self.settings.patience * self.settings.evaluate_every

    def note(self, nats: float) -> None:
        """Keeps the averaged weights where they are the best so far."""
        if nats < self.best_nats:
            self.best_nats, self.best_step = nats, self.step
            self.best = {name: value.clone() for name, value in self.average.items()}

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average,
            "best": self.best,
            "best_nats": self.best_nats,
            "best_step": self.best_step,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "minutes": self.minutes,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)  # an interruption while writing leaves the previous checkpoint whole

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average, self.best = state["average"], state["best"]
        self.best_nats, self.best_step = state["best_nats"], state["best_step"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.minutes = state["step"], state["minutes"]
        print(f"resumed at step {self.step}", flush=True)


def train_topics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[str],
    validation: Sequence[str],
    settings: TopicsSettings,
    checkpoint: Path,
) -> TopicsResult:
    """Trains the model in place on next-token prediction; it ends with the averaged weights that were best on validation.

    Args:
        model: the untrained model.
        tokenizer: its tokenizer.
        train: documents to learn from.
        validation: documents that decide when to stop.
        settings: how to train.
        checkpoint: file that training resumes from when it exists, and that is rewritten as training goes on.

    Returns:
        Steps, minutes and the validation loss.
    """
    torch.manual_seed(settings.seed)
    run = _Run(model, settings)
    if checkpoint.exists():
        run.load(checkpoint)
    start = time.monotonic() - 60 * run.minutes
    held = encode_documents(tokenizer, validation)
    data = _RandomRows(tokenizer, train, settings)
    losses: list[float] = []
    with _dropout(model, settings.dropout):
        while run.step < settings.num_steps and not run.is_stale:
            model.train()
            losses.append(run.train_step(data.draw(run.step)))
            run.minutes = (time.monotonic() - start) / 60
            if run.step % _PRINT_EVERY == 0:
                recent = sum(losses[-_PRINT_EVERY:]) / len(losses[-_PRINT_EVERY:])
                print(f"topics step {run.step} loss {recent:.4f} {run.minutes:.1f} min", flush=True)
            if run.step % settings.evaluate_every == 0 or run.step == settings.num_steps:
                with run.averaged():
                    nats = mean_nats(model, held, start=start_token(tokenizer), context=settings.row_tokens)
                run.note(nats)
                print(f"topics step {run.step} validation {nats:.4f}, best at {run.best_step}", flush=True)
                run.save(checkpoint)
    model.load_state_dict(run.best, strict=False)
    model.eval()
    return TopicsResult(run.best_step, run.minutes, run.best_nats)


class _RandomRows:
    """Rows cut at random places from the training text, whose words are split anew from time to time.

    What step `i` sees follows from the seed and `i` alone, so that a resumed training sees the same rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], settings: TopicsSettings) -> None:
        self._settings, self._start = settings, start_token(tokenizer)
        self._texts = list(texts)
        self._merges = MergeDropout(tokenizer.backend_tokenizer, settings.merge_dropout)
        self._era, self._stream = -1, torch.empty(0, dtype=torch.long)

    def draw(self, step: int) -> Tensor:
        """[batch_size, row_tokens] token numbers."""
        settings = self._settings
        if step // _STEPS_PER_SPLIT != self._era:
            self._era = step // _STEPS_PER_SPLIT
            seed = settings.seed * _SEED_STRIDE + self._era
            order = torch.randperm(len(self._texts), generator=torch.Generator().manual_seed(seed)).tolist()
            documents = self._merges.encode([self._texts[index] for index in order], seed)
            self._stream = torch.tensor([token for tokens in documents for token in (self._start, *tokens)])
        generator = torch.Generator().manual_seed(settings.seed * _SEED_STRIDE + step)
        num_places = len(self._stream) - settings.row_tokens + 1
        places = torch.randint(num_places, (settings.batch_size, 1), generator=generator)
        return self._stream[places + torch.arange(settings.row_tokens)]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text, without `<bos>`."""
    return [found.ids for found in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def start_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The number of `<bos>`."""
    start = tokenizer.bos_token_id
    assert isinstance(start, int)
    return start


@torch.no_grad()
def mean_nats(model: nn.Module, documents: Sequence[Sequence[int]], *, start: int, context: int) -> float:
    """Mean of -log p over all tokens of the documents.

    Windows of `context` tokens overlap by half, and each token is counted once: where its window gives it the longest past.

    Args:
        model: the model, in evaluation mode afterwards.
        documents: tokens of each document, without the start.
        start: token that every document begins with.
        context: the longest row that the model is given.
    """
    model.eval()
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.tensor([start, *document])
        done = 1
        for begin in range(0, len(tokens), context // 2):
            row = tokens[begin : begin + context]
            if begin + len(row) <= done:
                break
            logits = model(input_ids=row[None], use_cache=False).logits[0].float()
            nats = F.cross_entropy(logits[:-1], row[1:], reduction="none")
            total += nats[done - begin - 1 :].double().sum().item()
            count += begin + len(row) - done
            done = begin + len(row)
    return total / count


@contextmanager
def _dropout(model: PreTrainedModel, share: float) -> Generator[None]:
    """Gemma-2 has no dropout of its own: drops features of the embedding and of every part's output while the block runs."""

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, share, training=module.training)

    names = ("embed_tokens", "post_attention_layernorm", "post_feedforward_layernorm")
    parts = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in names]
    handles = [part.register_forward_hook(drop) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _learning_rate(settings: TopicsSettings, step: int) -> float:
    warm = settings.num_warmup_steps
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    course = (step - warm) / max(1, settings.num_steps - warm)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * course)))
