"""Whole GGUF files of random students: what the `gguf` package reads must be what was trained, or the writer refuses it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fraqat.errors import FraqatError
from fraqat.export import ExportJob, ModelDescription, layer_codes, target_named
from fraqat.export.gguf import FILE, file_tensors
from fraqat.export.gguf_names import NAME_TABLES
from fraqat.nn import quantized_layers
from fraqat.workflows.exporting import check_grid
from fuzz_exports import SCALES, quantize_for_
from fuzz_inputs import ACCEPTED, HOSTILE, REFUSED, damaged_bytes, damaged_values

_GEMMA = "Gemma2ForCausalLM"
_VOCAB_SIZE = 300


def gguf_writer(rng: random.Random, folder: Path) -> str:
    """A student with random tensors under the names of SD3, FLUX or Gemma-2, with odd names, settings and vocabularies."""
    torch.manual_seed(rng.randrange(2**31))
    class_name = rng.choice((*NAME_TABLES, _GEMMA))
    (folder / "out").mkdir()
    origin = _origin(rng, folder) if class_name == _GEMMA else None
    config = _config(rng) if class_name == _GEMMA else {}
    student = _gemma(rng, config) if class_name == _GEMMA else _transformer(rng, class_name)
    given = damaged_values(rng, config) if rng.random() < 0.3 else config
    title = rng.choice(HOSTILE) if rng.random() < 0.3 else "zoo:tiny"
    description = ModelDescription(class_name, given if isinstance(given, dict) else {"x": given}, title)
    float_dtype: Any = rng.choice(("float32", "bfloat16"))
    target = target_named("gguf")
    try:
        quantize_for_(rng, student, target)
        check_grid(student, target, accept_loss=False)
        with contextlib.redirect_stderr(io.StringIO()), _silent():
            target.write(ExportJob(student, lambda: (), description, origin, folder / "out", float_dtype, say=_quiet))
    except FraqatError as error:
        str(error).encode("utf-8", "surrogatepass")
        return REFUSED
    _check_file(student, description, folder / "out" / FILE, float_dtype)
    return ACCEPTED


@cache
def _files(class_name: str) -> tuple[nn.Module, bytes]:
    """A student and the file that was written of it."""
    rng = random.Random(class_name)
    while True:
        with tempfile.TemporaryDirectory() as name:
            folder, student = Path(name), _transformer(rng, class_name)
            job = ExportJob(
                student, lambda: (), ModelDescription(class_name, {}, "x"), None, folder, "bfloat16", _quiet
            )
            with contextlib.suppress(FraqatError):
                quantize_for_(rng, student, target_named("gguf"))
                target_named("gguf").write(job)
                return student, (folder / FILE).read_bytes()


def _quiet(text: str) -> None:
    return None


def gguf_reader(rng: random.Random, folder: Path) -> str:
    """A file with damaged bytes: refused, or read as tensors that fit the model."""
    student, data = _files(rng.choice(tuple(NAME_TABLES)))
    (folder / FILE).write_bytes(damaged_bytes(rng, data))
    try:
        opened = target_named("gguf").open(folder, student)
    except FraqatError:
        return REFUSED
    expected = layer_codes(student)
    assert all(codes.shape == expected[name].codes.shape for name, codes in opened.codes().items())
    return ACCEPTED


@contextlib.contextmanager
def _silent() -> Any:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def _check_file(student: nn.Module, description: ModelDescription, path: Path, float_dtype: str) -> None:
    """Names, values and settings of the file against the student."""
    import gguf

    layers = {f"{name}.weight": layer for name, layer in quantized_layers(student)}
    values = {name: t.float() for name, t in student.state_dict().items() if "_quantizer." not in name}
    if description.class_name == _GEMMA:
        del values["lm_head.weight"]
    values |= {name: layer.weight_quantizer(layer.weight) for name, layer in layers.items()}
    reader = gguf.GGUFReader(path)
    stored = {t.name: t for t in reader.tensors}
    entries = file_tensors(description.class_name, list(values))
    assert set(stored) == {entry.name for entry in entries}
    for entry in entries:
        wanted = torch.cat([values[source] for source in entry.sources]) + entry.shift
        if entry.swaps_halves:
            wanted = torch.cat(wanted.chunk(2)[::-1])
        tensor = stored[entry.name]
        if tensor.tensor_type is gguf.GGMLQuantizationType.BF16:
            assert float_dtype == "bfloat16" and wanted.ndim == 2
            wanted = wanted.bfloat16().float()
        is_packed = tensor.tensor_type is gguf.GGMLQuantizationType.Q4_0
        assert is_packed == (entry.sources[0] in layers), entry.name
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(found, wanted), f"{entry.name}: {float((found - wanted).abs().max()):g} apart"
    _check_settings(description, reader)
    opened = target_named("gguf").open(path.parent, student)
    expected = layer_codes(student)
    assert all(torch.equal(opened.codes()[name], codes.codes) for name, codes in expected.items())


def _check_settings(description: ModelDescription, reader: Any) -> None:
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert found["general.name"] == description.base_pipeline
    if description.class_name != _GEMMA:
        return
    wanted = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "context_length": "max_position_embeddings",
    }
    for ours, theirs in wanted.items():
        assert found[f"gemma2.{ours}"] == description.config[theirs], ours
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == len(found["tokenizer.ggml.token_type"]) == description.config["vocab_size"]


def _named_(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module at a dotted place."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:  # pyright: ignore[reportPrivateUsage]
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)


def _transformer(rng: random.Random, class_name: str) -> nn.Module:
    """Linear layers of random sizes at the places of a class' table, some of them missing, some odd."""
    table, root = NAME_TABLES[class_name], type(class_name, (nn.Module,), {})()
    entries: list[Sequence[str]] = [modules for modules in table.top.values() if rng.random() < 0.7]
    for ours, (_, block) in table.blocks.items():
        for number in rng.choice(((0,), (0, 1), (0, 2), (0, 1, 10))):
            kept = [modules for modules in block.values() if rng.random() < 0.5]
            entries += [[f"{ours}.{number}.{module}" for module in modules] for modules in kept]
    for modules in entries:
        num_inputs = rng.choice((32, 32, 64, 96, 1, 33))
        has_bias = rng.random() < 0.7
        for module in modules:
            if rng.random() < 0.01:
                continue
            _named_(root, module, _module(rng, module, num_inputs if rng.random() < 0.99 else 64, has_bias))
    for name in table.whole.values():
        *parents, last = name.split(".")
        if parents and parents[0] not in root._modules:  # pyright: ignore[reportPrivateUsage]
            root.add_module(parents[0], nn.Module())
        root.get_submodule(".".join(parents)).register_buffer(last, torch.randn(1, rng.choice((1, 4)), 32))
    if rng.random() < 0.05:
        root.add_module(rng.choice(HOSTILE).replace(".", "_") or "x", nn.Linear(32, 2))
    return root


def _module(rng: random.Random, name: str, num_inputs: int, has_bias: bool) -> nn.Module:
    if "norm_" in name.rsplit(".", 1)[-1]:
        return nn.LayerNorm(rng.choice((1, 4, 32)), bias=has_bias)
    if name.endswith("pos_embed.proj"):
        return nn.Conv2d(rng.choice((1, 4)), rng.choice((1, 32)), 2, bias=has_bias)
    layer = nn.Linear(num_inputs, rng.choice((1, 2, 6, 32)), bias=has_bias)
    with torch.no_grad():
        layer.weight.mul_(1.0 if rng.random() < 0.9 else rng.choice(SCALES))
    return layer


def _config(rng: random.Random) -> dict[str, Any]:
    from transformers import Gemma2Config

    head_dim = rng.choice((4, 32))
    return Gemma2Config(
        vocab_size=_VOCAB_SIZE,
        hidden_size=rng.choice((32, 64, 40)),
        intermediate_size=rng.choice((32, 96, 8)),
        num_hidden_layers=rng.choice((1, 2)),
        num_attention_heads=rng.choice((1, 2)),
        num_key_value_heads=1,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim if rng.random() < 0.95 else 16,
        sliding_window=rng.choice((1, 8, 4096)),
        max_position_embeddings=rng.choice((1, 64, 2**20)),
        tie_word_embeddings=rng.random() < 0.95,
        attention_bias=rng.random() < 0.05,
    ).to_dict()


def _gemma(rng: random.Random, config: Mapping[str, Any]) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if rng.random() < 0.9 else rng.choice(SCALES))
    return model


def _origin(rng: random.Random, folder: Path) -> Path | None:
    """A folder with a vocabulary, mostly with something wrong in it."""
    if rng.random() < 0.02:
        return None
    origin = folder / "origin"
    origin.mkdir()
    if rng.random() < 0.3:
        data = _sentencepiece()
        (origin / "tokenizer.model").write_bytes(damaged_bytes(rng, data) if rng.random() < 0.4 else data)
    for name, value in (("tokenizer.json", _tokenizer()), ("tokenizer_config.json", _TOKENIZER_CONFIG)):
        how = rng.random()
        values = damaged_values(rng, value) if how < 0.3 else value
        data = json.dumps(values).encode("utf-8", "replace")
        (origin / name).write_bytes(damaged_bytes(rng, data) if 0.3 <= how < 0.45 else data)
    return origin


_TOKENIZER_CONFIG = {
    "bos_token": "<bos>",
    "eos_token": {"content": "<eos>"},
    "add_bos_token": True,
    "chat_template": "{{ x }}",
}


def _tokenizer() -> dict[str, Any]:
    texts = ["<pad>", "<eos>", "<bos>", *(chr(number) for number in range(33, 127)), "ab", "abc"]
    special = [{"id": i, "content": text, "special": True} for i, text in enumerate(texts[:3])]
    return {
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>"}}, {"Sequence": {"id": "A"}}],
        },
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": [["a", "b"], ["ab", "c"]],
        },
    }


@cache
def _sentencepiece() -> bytes:
    import sentencepiece

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.Train(
            f"--input={name}/text --model_prefix={name}/tokenizer --vocab_size=290 --model_type=bpe --byte_fallback=true "
            "--pad_id=0 --eos_id=1 --bos_id=2 --unk_id=3 --hard_vocab_limit=false --minloglevel=2"
        )
        return (Path(name) / "tokenizer.model").read_bytes()
