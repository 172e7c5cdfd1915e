"""Causal language models of transformers as a task for the trainer, and loading and writing text with them.

Shape suffixes: N samples, L tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from fraqat.distill import LANGUAGE_LOSSES, Batch, LossSpec, Prediction
from fraqat.distill.micro_batch import shares_of, split_batch
from fraqat.distill.next_token import HEAD, HEAD_BIAS, LOGIT_SCALE, SOFTCAP, logit_chunks, next_token_kl, token_rows
from fraqat.errors import ModelError, config_error
from fraqat.tasks.language_layers import decoder_layers, head_parts
from fraqat.tasks.language_spec import LanguageSpec
from fraqat.tasks.loading import check_complete, check_component, explain_loading, is_folder
from fraqat.tasks.row_task import BatchSource, RowTask
from fraqat.tasks.spec import ModelSpec

INPUTS, MASK = "input_ids", "attention_mask"
_HIDDEN = "hidden_{}"
_CHECKED_TOKENS = 8
_HEAD_TOLERANCE = 0.02


class LanguageTask(RowTask):
    """Distils the next-token distributions of a causal language model, over its full vocabulary.

    Args:
        teacher: A decoder-only model of transformers with a linear head; it gives the class and its configuration.
        source: Token rows, made with the teacher's tokenizer.
        spec: Temperature, chunk size, layers of the hidden-state term.

    Raises:
        ModelError: The model's logits do not come from a linear head in a way that is known.
        ConfigError: A layer of `spec.hidden_layers` does not exist.
    """

    def __init__(self, teacher: nn.Module, source: BatchSource, spec: LanguageSpec | None = None):
        super().__init__(source)
        self.spec = spec or LanguageSpec()
        num_layers = len(decoder_layers(teacher)[1])
        if any(layer >= num_layers for layer in self.spec.hidden_layers):
            raise config_error(
                "language.hidden_layers",
                list(self.spec.hidden_layers),
                allowed=f"0 to {num_layers - 1}, the teacher's decoder layers",
                fix="leave the others out",
            )
        check_head(teacher)

    @property
    def constant_outputs(self) -> frozenset[str]:
        """What makes logits of hidden states: the head's weight and bias, and the numbers after it."""
        return frozenset((HEAD, HEAD_BIAS, LOGIT_SCALE, SOFTCAP))

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The token rows as they are; nothing is random."""
        return {name: batch[name] for name in (INPUTS, MASK) if name in batch}

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """`hidden`, the final states [N, L, D], with the head that makes logits of them, and `hidden_i` of chosen layers."""
        return predict_hidden(model, inputs, self.spec.hidden_layers)

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        """Weighted sum of `kl` and `hidden_mse`, means over the tokens that the mask leaves, 0-dim float32.

        `kl` is KL(teacher || student) of the next-token distributions. `hidden_mse` is the squared distance of hidden states
        over the teacher's squares, averaged over the chosen layers.

        Raises:
            ConfigError: Another term, or `hidden_mse` without layers.
        """
        mask = inputs.get(MASK)
        total = torch.zeros((), device=student["hidden"].device)
        for term in terms:
            if term.name not in LANGUAGE_LOSSES:
                names = ", ".join(LANGUAGE_LOSSES)
                raise config_error("losses.name", term.name, allowed=f"{names} for a language model", fix="use kl")
            if term.name == "kl":
                spec = self.spec
                value = next_token_kl(
                    student, teacher, mask, temperature=spec.temperature, chunk_tokens=spec.chunk_tokens
                )
            else:
                value = self._hidden_distance(student, teacher, mask)
            total = total + term.weight * value
        return total

    def split_inputs(self, inputs: Batch, num_parts: int) -> list[tuple[Batch, float]]:
        """Pieces with their share of the tokens that count."""
        parts = split_batch(inputs, num_parts)
        counts = [int(part[MASK].sum()) if MASK in part else part[INPUTS].numel() for part in parts]
        return list(zip(parts, shares_of(counts), strict=True))

    def _hidden_distance(self, student: Prediction, teacher: Prediction, mask: Tensor | None) -> Tensor:
        if not self.spec.hidden_layers:
            raise config_error(
                "losses.name", "hidden_mse", allowed="with language.hidden_layers", fix="choose layers, such as [0, 1]"
            )
        rows = token_rows(student, mask)
        distances: list[Tensor] = []
        for layer in self.spec.hidden_layers:
            ours, theirs = (
                prediction[_HIDDEN.format(layer)].flatten(0, -2)[rows].float() for prediction in (student, teacher)
            )
            distances.append((ours - theirs).square().mean() / theirs.square().mean())
        return torch.stack(distances).mean()


def predict_hidden(model: nn.Module, inputs: Batch, layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """Final hidden states and head of a causal language model, without its logits.

    Args:
        model: Teacher or student.
        inputs: `input_ids` and, where rows are padded, `attention_mask` [N, L].
        layers: Decoder layers, from 0, whose outputs are returned too, as `hidden_i`.
    """
    device = next(model.parameters()).device
    moved = {name: inputs[name].to(device) for name in (INPUTS, MASK) if name in inputs}
    with _outputs_of(model, layers) as found:
        states = cast(Any, model).base_model(**moved, use_cache=False).last_hidden_state
    return {**head_parts(model, states), **{_HIDDEN.format(layer): found[layer] for layer in layers}}


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Checks that `predict_hidden` leads to the model's own logits.

    Raises:
        ModelError: The model does something else between hidden states and logits.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    was_training = model.training
    model.eval()
    rows = torch.arange(_CHECKED_TOKENS, device=device)[None]
    own = cast(Any, model)(input_ids=rows, use_cache=False).logits.float()
    prediction = predict_hidden(model, {INPUTS: rows})
    _, (logits,) = next(logit_chunks((prediction,), torch.arange(_CHECKED_TOKENS, device=device)))
    model.train(was_training)
    if own[0].shape != logits.shape or (own[0] - logits).abs().max() > _HEAD_TOLERANCE * own.abs().max():
        raise ModelError(
            f"{type(model).__name__} makes its logits in a way that is not known: its head's scale or softcap is missing. Fix: "
            "add it to head_parts in fraqat/tasks/language_layers.py."
        )


def load_language_model(spec: ModelSpec, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Loads a causal language model and its tokenizer, the model in evaluation mode on the device that `spec` asks for.

    Args:
        spec: `source` must be a folder or a hub id (`zoo:` names are resolved by the caller).
        dtype: Precision of all weights.

    Returns:
        A model of `transformers.AutoModelForCausalLM` and the tokenizer beside it.

    Raises:
        ModelError: Missing, gated, truncated or pickled files, a configuration that is no causal language model, or one whose
            layers cannot be quantized; the message says what to do.
        ConfigError: `spec` names a single file.
    """
    if spec.single_file is not None:
        raise config_error(
            "model.single_file", spec.single_file, allowed="null for a language model", fix="use its folder or hub id"
        )
    if is_folder(spec):
        folder = Path(spec.source)
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is no model of transformers: config.json is missing. Fix: pass the folder that holds it."
            )
        check_component(folder)
    with explain_loading(spec):
        model, report = cast(Any, transformers.AutoModelForCausalLM).from_pretrained(
            spec.source,
            revision=spec.revision,
            variant=spec.variant,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{spec.source} lacks {len(missing)} tensors, such as {missing[0]}. Fix: copy the model again, and check that "
            "it is a causal language model."
        )
    check_complete(model, spec.source)
    decoder_layers(model)
    return model.to(spec.torch_device).eval(), load_tokenizer(spec)


def build_language_model(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """An untrained model, float32, on the device that is torch's default.

    Args:
        class_name: Such as `Gemma2ForCausalLM`.
        config: Its configuration, as `config.to_dict()` gives it.

    Raises:
        ModelError: transformers has no causal language model of this name.
    """
    model_class: Any = getattr(transformers, class_name, None)
    if model_class is None or not hasattr(model_class, "config_class") or not hasattr(model_class, "generate"):
        raise ModelError(
            f"model class {class_name} is no causal language model of transformers as it is installed here. Fix: install the "
            "version that the model was made with."
        )
    return model_class(model_class.config_class.from_dict(dict(config)))


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer of a language model.

    Raises:
        ModelError: There is none, or it cannot be had.
    """
    with explain_loading(spec):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            spec.source, revision=spec.revision, trust_remote_code=False
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes where it finds no file
        raise ModelError(
            f"{spec.source} has no tokenizer: its vocabulary is empty. Fix: copy the model's tokenizer.json and "
            "tokenizer_config.json beside its weights."
        )
    return tokenizer


@torch.no_grad()
def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Continues each prompt on its own; continuation i is drawn with seed `seed + i`.

    Args:
        model: Teacher or student.
        tokenizer: Of both.
        prompts: N texts.
        max_new_tokens: Longest continuation; an end-of-text token ends it earlier.
        temperature: 0 takes the most probable token each time.
        seed: Of the first continuation; the global generator is left as it was.

    Returns:
        N continuations without their prompts.
    """
    device = next(model.parameters()).device
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    texts: list[str] = []
    for index, prompt in enumerate(prompts):
        encoded = tokenizer(prompt, return_tensors="pt").to(device)
        with torch.random.fork_rng():
            torch.manual_seed(seed + index)
            tokens = cast(Any, model).generate(
                input_ids=encoded[INPUTS],
                attention_mask=encoded[MASK],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampling,
            )
        texts.append(tokenizer.decode(tokens[0, encoded[INPUTS].shape[1] :], skip_special_tokens=True))
    return texts


@contextmanager
def _outputs_of(model: nn.Module, layers: Sequence[int]) -> Generator[dict[int, Tensor]]:
    """Collects the outputs of decoder layers while the block runs."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, output: Any) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output

    chosen = decoder_layers(model)[1] if layers else []
    handles = [
        chosen[layer].register_forward_hook(lambda module, arguments, output, layer=layer: keep(layer, output))
        for layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
