"""Laws of the language task, on tiny random models of several architectures."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from tiny_language import TIED, VOCABULARY, tiny_model, tiny_tokenizer

from fraqat.data.loader import RowSource, TensorRows
from fraqat.distill import Distiller, LossSpec, TrainSpec
from fraqat.errors import ConfigError, ModelError
from fraqat.nn import LayerRule, describe, quantize_, quantized_layers, set_bits_, to_packed_, unquantize_
from fraqat.schedules import LearningRateSpec, ScheduleSpec
from fraqat.tasks import ModelSpec
from fraqat.tasks.language import (
    LanguageTask,
    build_language_model,
    check_head,
    generate_text,
    load_language_model,
    predict_hidden,
)
from fraqat.tasks.language_layers import decoder_layers, head_name, head_rules, language_families
from fraqat.tasks.language_spec import LanguageSpec

ARCHITECTURES = ("Llama", "Gemma2", "Qwen2", "Qwen3", "GPTNeoX", "OPT", "Granite", "Cohere", "Phi")
FEED_FORWARD = {"Llama": "model.layers.1.mlp.gate_proj", "GPTNeoX": "gpt_neox.layers.1.mlp.dense_h_to_4h"}
KL = (LossSpec("kl"),)
pytestmark = pytest.mark.xdist_group("language")


def rows(num: int = 6, seed: int = 3) -> TensorRows:
    tokens = torch.randint(3, VOCABULARY, (num, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return TensorRows({"input_ids": tokens, "attention_mask": mask})


def task_of(model: Any, **values: Any) -> LanguageTask:
    return LanguageTask(model, RowSource(rows(), rows(4, 5)), LanguageSpec(**values))


def student_of(teacher: Any, bits: float = 4.0) -> Any:
    student = copy.deepcopy(teacher)
    quantize_(student, rules=head_rules(student), families=language_families(student))
    set_bits_(student, bits)
    return student


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_loss_is_the_kl_of_the_models_own_logits(architecture: str) -> None:
    teacher = tiny_model(architecture)
    student = student_of(teacher)
    task = task_of(teacher, chunk_tokens=5)
    inputs = task.make_inputs(next(iter(task.train_stream(4, 0))), torch.Generator())
    with torch.no_grad():
        ours = task.loss(task.predict(student, inputs), task.predict(teacher, inputs), inputs, KL)
        log_q, log_p = (m(**inputs, use_cache=False).logits.double().log_softmax(-1) for m in (student, teacher))
    per_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    wanted = per_token[inputs["attention_mask"].bool()].mean()
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert ours.item() > 1e-4


def test_families_cover_the_decoder_layers_and_nothing_else(architecture: str) -> None:
    model = tiny_model(architecture)
    name, layers = decoder_layers(model)
    families = language_families(model)
    assert set(families.names()) == {"FF", "Attn", "TF", "All"}
    shown = {row.name: row.family for row in describe(model, families).rows}
    inside = {layer: family for layer, family in shown.items() if layer.startswith(f"{name}.")}
    assert len(layers) == 2
    assert set(inside.values()) == {"FF", "Attn"}
    assert {family for layer, family in shown.items() if layer not in inside} <= {"-"}
    for layer, family in inside.items():
        assert (family == "Attn") == ("attn" in layer or "attention" in layer), layer


def test_the_head_stays_in_floating_point_by_default(architecture: str) -> None:
    model = tiny_model(architecture)
    student = student_of(model)
    kept = {row.name for row in describe(student, language_families(model)).rows if row.spec is None}
    assert head_name(model) in kept
    assert kept <= {head_name(model)}
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert tied == (architecture in TIED)


def test_gradients_reach_every_trained_matrix() -> None:
    teacher = tiny_model("Gemma2")
    student = student_of(teacher).train()
    task = task_of(teacher)
    inputs = task.validation_batches(4)[0]
    with torch.no_grad():
        target = task.predict(teacher, inputs)
    task.loss(task.predict(student, inputs), target, inputs, KL).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_a_quantized_head_gives_its_own_logits() -> None:
    teacher = tiny_model("Gemma2")
    student = copy.deepcopy(teacher)
    quantize_(student, families=language_families(student))
    task = task_of(teacher)
    inputs = task.validation_batches(4)[0]
    with torch.no_grad():
        found = task.loss(task.predict(student, inputs), task.predict(teacher, inputs), inputs, KL)
        log_q, log_p = (m(**inputs).logits.double().log_softmax(-1) for m in (student, teacher))
    per_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    wanted = per_token[inputs["attention_mask"].bool()].mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_hidden_states_are_those_of_the_layers() -> None:
    model = tiny_model("Llama")
    inputs = rows().batches(3)[0]
    with torch.no_grad():
        found = predict_hidden(model, inputs, (0,))
        wanted = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(found["hidden_0"], wanted[1])
    assert torch.equal(found["hidden"], wanted[2])
    assert "hidden_1" not in found


def test_the_hidden_term_is_relative_to_the_teacher() -> None:
    teacher, student = tiny_model("Llama"), tiny_model("Llama", seed=1)
    task = task_of(teacher, hidden_layers=(0, 1))
    inputs = task.make_inputs(rows().batches(6)[0], torch.Generator())
    terms = (LossSpec("kl", 2.0), LossSpec("hidden_mse", 0.5))
    with torch.no_grad():
        ours, theirs = task.predict(student, inputs), task.predict(teacher, inputs)
        both = task.loss(ours, theirs, inputs, terms)
        kl = task.loss(ours, theirs, inputs, KL)
    keep = inputs["attention_mask"].bool()

    def distance(layer: int) -> Tensor:
        mine, other = ours[f"hidden_{layer}"][keep], theirs[f"hidden_{layer}"][keep]
        return (mine - other).square().sum() / other.square().sum()

    assert both.item() == pytest.approx(2 * kl.item() + 0.25 * (distance(0) + distance(1)).item(), rel=1e-5)


@pytest.mark.parametrize("values", [{}, {"hidden_layers": (0, 1), "chunk_tokens": 3, "temperature": 2.0}])
def test_training_brings_the_student_closer(values: dict[str, Any], tmp_path: Path) -> None:
    teacher = tiny_model("Gemma2")
    student = student_of(teacher)
    losses = (LossSpec("kl"), *((LossSpec("hidden_mse", 0.1),) if values else ()))
    spec = TrainSpec(
        batch_size=6, losses=losses, learning_rate=LearningRateSpec(peak=3e-3), tensorboard=False, validate_every=1000
    )
    source = RowSource(rows(), rows())
    run = Distiller(
        LanguageTask(teacher, source, LanguageSpec(**values)),
        teacher,
        student,
        ScheduleSpec("fractional").resolve(4.0, 12),
        spec,
        tmp_path,
    )
    before = run.validate()
    assert run.run().validation_loss < 0.8 * before
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_padding_on_the_right_changes_nothing() -> None:
    teacher, student = tiny_model("Llama"), tiny_model("Llama", seed=1)
    task = task_of(teacher)
    short = {"input_ids": rows().columns["input_ids"][:2, :5]}
    long = {"input_ids": F.pad(short["input_ids"], (0, 3)), "attention_mask": F.pad(torch.ones(2, 5).long(), (0, 3))}
    with torch.no_grad():
        losses = [task.loss(task.predict(student, x), task.predict(teacher, x), x, KL).item() for x in (short, long)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_calibration_and_validation_take_the_rows_in_order() -> None:
    task = task_of(tiny_model("Llama"))
    assert torch.equal(task.calibration_batches(3, 2)[1]["input_ids"], rows().columns["input_ids"][2:3])
    assert torch.equal(task.validation_batches(4)[0]["input_ids"], rows(4, 5).columns["input_ids"])
    assert task.steps_per_epoch(2) == 3
    with pytest.raises(ConfigError, match=r"train\.batch_size = 7"):
        task.train_stream(7, 0)


@pytest.mark.parametrize(
    ("terms", "values", "message"),
    [
        ((LossSpec("mse"),), {}, r"losses\.name = 'mse' .* kl, hidden_mse for a language model"),
        ((LossSpec("hidden_mse"),), {}, r"losses\.name = 'hidden_mse' .* with language\.hidden_layers"),
    ],
)
def test_impossible_terms_are_refused(terms: Any, values: Any, message: str) -> None:
    teacher = tiny_model("Llama")
    task = task_of(teacher, **values)
    inputs = task.validation_batches(4)[0]
    prediction = task.predict(teacher, inputs)
    with pytest.raises(ConfigError, match=message):
        task.loss(prediction, prediction, inputs, terms)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, r"language\.temperature = 0\.0"),
        ({"chunk_tokens": 0}, r"language\.chunk_tokens = 0"),
        ({"hidden_layers": (1, 1)}, r"language\.hidden_layers = \[1, 1\]"),
        ({"hidden_layers": (-1,)}, r"language\.hidden_layers = \[-1\]"),
        ({"hidden_layers": (2,)}, r"language\.hidden_layers = \[2\] .* 0 to 1, the teacher's decoder layers"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(tiny_model("Llama"), **values)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel keeps most weights .* outside nn.Linear, in Conv1D"):
        language_families(tiny_model("GPT2"))


def test_an_unknown_way_to_logits_is_refused() -> None:
    model = tiny_model("Llama")
    forward = model.forward

    def scaled(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = 2 * output.logits
        return output

    model.forward = scaled
    with pytest.raises(ModelError, match="LlamaForCausalLM makes its logits in a way that is not known"):
        check_head(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "model"
    tiny_model("Gemma2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def copy_of(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_saved_model_is_loaded_in_the_precision_asked_for(saved: Path) -> None:
    model, tokenizer = load_language_model(ModelSpec(str(saved), device="cpu"))
    original = tiny_model("Gemma2")
    for name, value in original.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]
    half, _ = load_language_model(ModelSpec(str(saved), device="cpu"), dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_sharded_weights_and_variants_are_loaded(tmp_path: Path) -> None:
    model = tiny_model("Llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB", variant="fp32")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model.fp32-*.safetensors"))) > 1
    loaded, _ = load_language_model(ModelSpec(str(tmp_path), variant="fp32", device="cpu"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_language_model(ModelSpec(str(tmp_path), device="cpu"))


def test_damaged_folders_are_named(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    spec = ModelSpec(str(folder), device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or damaged"):
        load_language_model(spec)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        load_language_model(spec)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        load_language_model(spec)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_language_model(spec)


def test_missing_tensors_are_named(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ModelError, match=r"lacks \d+ tensors, such as model\.layers\.2"):
        load_language_model(ModelSpec(str(folder), device="cpu"))


def test_a_folder_without_tokenizer_or_of_another_kind_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer: its vocabulary is empty"):
        load_language_model(ModelSpec(str(folder), device="cpu"))
    (folder / "config.json").write_text(json.dumps({"model_type": "vits"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_language_model(ModelSpec(str(folder), device="cpu"))


def test_hub_ids_are_asked_for_safetensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    seen: dict[str, Any] = {}

    def gated(source: str, **arguments: Any) -> None:
        seen.update(arguments, source=source)
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", gated)
    with pytest.raises(ModelError, match=r"accept the licence on https://huggingface.co/google/gemma-2-2b-it"):
        load_language_model(ModelSpec("google/gemma-2-2b-it", revision="abc", variant="fp16", device="cpu"))
    assert (seen["use_safetensors"], seen["trust_remote_code"]) == (True, False)
    assert (seen["revision"], seen["variant"]) == ("abc", "fp16")
    with pytest.raises(ModelError, match="there is no such folder, and it is no hub id"):
        load_language_model(ModelSpec("./nowhere", device="cpu"))
    with pytest.raises(ConfigError, match=r"model\.single_file = 'x\.safetensors' .* null for a language model"):
        load_language_model(ModelSpec("google/gemma-2-2b-it", single_file="x.safetensors", device="cpu"))


def test_a_model_is_rebuilt_from_its_description(architecture: str) -> None:
    model = tiny_model(architecture)
    config = json.loads(json.dumps(model.config.to_dict()))
    built = build_language_model(type(model).__name__, config).eval()
    built.load_state_dict(model.state_dict())
    tokens = rows().columns["input_ids"]
    with torch.no_grad():
        assert torch.equal(built(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_class_that_is_no_language_model_is_refused() -> None:
    for name in ("Gemma9ForCausalLM", "GemmaConfig"):
        with pytest.raises(ModelError, match=f"model class {name} is no causal language model"):
            build_language_model(name, {})


def test_a_packed_model_gives_the_quantized_models_prediction() -> None:
    teacher = tiny_model("Gemma2")
    student = copy.deepcopy(teacher)
    quantize_(student, families=language_families(student))
    packed = copy.deepcopy(student)
    unquantize_(packed)
    for name, layer in quantized_layers(student):
        codes, qparams = layer.weight_quantizer.codes(layer.weight)
        to_packed_(packed.get_submodule(name), layer.spec, codes, qparams)
    task = task_of(teacher)
    inputs = task.validation_batches(4)[0]
    with torch.no_grad():
        ours, theirs = task.predict(packed, inputs), task.predict(student, inputs)
        loss = task.loss(ours, theirs, inputs, KL)
    assert torch.equal(ours["head"], theirs["head"])
    assert loss.item() < 1e-7


def test_text_does_not_depend_on_its_neighbours_or_the_global_generator() -> None:
    model, tokenizer = tiny_model("Gemma2"), tiny_tokenizer()
    prompts = ("w5 w6 w7", "w8")
    greedy = generate_text(model, tokenizer, prompts, max_new_tokens=6)
    assert generate_text(model, tokenizer, prompts[1:], max_new_tokens=6) == greedy[1:]
    state = torch.get_rng_state()
    drawn = generate_text(model, tokenizer, prompts, max_new_tokens=6, temperature=1.0, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert generate_text(model, tokenizer, prompts[1:], max_new_tokens=6, temperature=1.0, seed=5) == drawn[1:]
    assert drawn != generate_text(model, tokenizer, prompts, max_new_tokens=6, temperature=1.0, seed=9)


def test_a_rule_of_the_user_wins_over_the_default() -> None:
    student = tiny_model("Llama")
    rules = (*head_rules(student), LayerRule(pattern="lm_head", weight_bits=8.0))
    report = quantize_(student, rules=rules, families=language_families(student))
    bits = {row.name: row.spec.weight.bits for row in report.rows if row.spec is not None}
    assert bits["lm_head"] == 8.0
    assert bits["model.layers.0.mlp.up_proj"] == 4.0
