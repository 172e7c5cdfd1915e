"""Laws of the text-to-speech task, on tiny random models of both architectures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.data.speech import Speech
from fraqat.distill import LossSpec
from fraqat.errors import ConfigError, ModelError
from fraqat.nn import describe, quantize_, quantized_layers
from fraqat.tasks.speech import SpeechTask, encode_speech, speech_source
from fraqat.tasks.speech_architectures import SPEECH_ARCHITECTURES, speech_architecture_of
from fraqat.tasks.speech_loading import build_speech_model, synthesize, to_waveforms

pytestmark = pytest.mark.xdist_group("speech")  # one worker makes the models

SPEECHT5: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "speech_decoder_prenet_units": 32,
    "speech_decoder_postnet_units": 32,
    "speech_decoder_postnet_layers": 2,
    "speaker_embedding_dim": 8,
    "max_speech_positions": 300,
    "max_text_positions": 40,
}
FASTSPEECH2: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "encoder_num_attention_heads": 2,
    "decoder_num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_linear_units": 64,
    "decoder_linear_units": 64,
    "speech_decoder_postnet_layers": 2,
    "speech_decoder_postnet_units": 32,
    "duration_predictor_layers": 1,
    "duration_predictor_channels": 32,
    "energy_predictor_layers": 1,
    "energy_predictor_channels": 32,
    "pitch_predictor_layers": 1,
    "pitch_predictor_channels": 32,
    "speaker_embed_dim": 8,
}
CONFIGS = {"SpeechT5ForTextToSpeech": SPEECHT5, "FastSpeech2ConformerModel": FASTSPEECH2}
TEXTS = ("draw red two", "find green", "no")
MSE = [LossSpec()]


def tokenize(texts) -> dict[str, Tensor]:
    ids = [torch.tensor([4 + ord(letter) % 27 for letter in text] + [2]) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)
    lengths = torch.tensor([len(row) for row in ids])
    return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}


def some_speech(num_copies: int = 1) -> Speech:
    generator = torch.Generator().manual_seed(0)
    mels = tuple(torch.randn(length, 80, generator=generator) - 2 for length in (21, 34, 8) * num_copies)
    return Speech(TEXTS * num_copies, mels, torch.randn(3 * num_copies, 8, generator=generator))


def tiny_model(class_name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_speech_model(class_name, CONFIGS[class_name])
    for name, parameter in model.named_parameters():
        if name == "duration_predictor.linear.bias":
            nn.init.constant_(parameter, 1.2)  # two or three frames for each letter
        if name == "speech_decoder_postnet.prob_out.bias":
            nn.init.constant_(parameter, -8.0)  # speaks up to the limit
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=list(CONFIGS))
def teacher(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def speecht5() -> nn.Module:
    return tiny_model("SpeechT5ForTextToSpeech")


@pytest.fixture(scope="module")
def task(teacher: nn.Module) -> SpeechTask:
    return SpeechTask(teacher, speech_source(teacher, tokenize, some_speech(2), some_speech()))


def inputs_of(task: SpeechTask, seed: int = 0) -> Any:
    return task.make_inputs(task.validation_batches(3)[0], torch.Generator().manual_seed(seed))


def make_student(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    architecture = speech_architecture_of(student)
    quantize_(student, rules=architecture.default_rules(), families=architecture.families)
    return student


def test_a_copy_of_the_teacher_has_no_loss_even_in_training_mode(task: SpeechTask, teacher: nn.Module) -> None:
    student, inputs = copy.deepcopy(teacher).train(), inputs_of(task)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        first, second = task.predict(student, inputs), task.predict(teacher, inputs)
    assert task.loss(first, second, inputs, MSE) == 0
    assert student.training and all(module.training for module in student.modules())
    for name, value in student.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} was changed by a prediction"


def test_outputs_are_those_that_the_table_weighs_and_masks(task: SpeechTask, teacher: nn.Module) -> None:
    inputs = inputs_of(task)
    with torch.no_grad():
        outputs = task.predict(teacher, inputs)
    masks = task.architecture.calls.masks(inputs)
    assert set(outputs) == set(masks) == set(task.architecture.weights)
    for name, output in outputs.items():
        assert output.shape[:2] == masks[name].shape, name
        assert output.is_floating_point() and torch.isfinite(output).all()
    assert torch.equal(masks["spectrogram"].sum(1), inputs["num_frames"])


def test_padding_is_not_in_the_loss(task: SpeechTask, teacher: nn.Module) -> None:
    inputs = inputs_of(task)
    with torch.no_grad():
        outputs = task.predict(teacher, inputs)
    masks = task.architecture.calls.masks(inputs)
    for name, output in outputs.items():
        valid = masks[name].view(*masks[name].shape, *(1,) * (output.ndim - 2))
        assert not valid.all(), "without padding this test says nothing"
        assert task.loss({**outputs, name: torch.where(valid, output, 1e3)}, outputs, inputs, MSE) == 0
        moved = torch.where(valid, output + 2, output)
        wanted = 4 * task.architecture.weights[name]
        assert float(task.loss({**outputs, name: moved}, outputs, inputs, MSE)) == pytest.approx(wanted, rel=1e-4)


def test_terms_add_up_by_weight(task: SpeechTask, teacher: nn.Module) -> None:
    inputs = inputs_of(task)
    with torch.no_grad():
        outputs = task.predict(teacher, inputs)
    moved = {name: output + 0.5 for name, output in outputs.items()}
    parts = [task.loss(moved, outputs, inputs, [LossSpec(name)]) for name in ("mse", "l1")]
    both = task.loss(moved, outputs, inputs, [LossSpec("mse", 2.0), LossSpec("l1", 3.0)])
    assert float(both) == pytest.approx(float(2 * parts[0] + 3 * parts[1]))
    with pytest.raises(ConfigError, match=r"losses\.name = 'kl' .* text-to-speech model"):
        task.loss(moved, outputs, inputs, [LossSpec("kl")])


def test_every_quantized_layer_gets_a_gradient(task: SpeechTask, teacher: nn.Module) -> None:
    student, inputs = make_student(teacher), inputs_of(task)
    with torch.no_grad():
        wanted = task.predict(teacher, inputs)
    loss = task.loss(task.predict(student, inputs), wanted, inputs, MSE)
    loss.backward()
    assert loss.item() > 0
    for name, layer in quantized_layers(student):
        gradient = layer.weight.grad
        assert gradient is not None and bool(gradient.abs().sum() > 0), name


def test_training_on_the_loss_brings_the_student_to_the_teacher(task: SpeechTask, teacher: nn.Module) -> None:
    student, inputs = make_student(teacher), inputs_of(task)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    with torch.no_grad():
        wanted = task.predict(teacher, inputs)
    losses: list[float] = []
    for _ in range(8):
        loss = task.loss(task.predict(student, inputs), wanted, inputs, MSE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_inputs_come_from_the_generator_alone(task: SpeechTask) -> None:
    before = torch.get_rng_state()
    first, again, other = inputs_of(task, 1), inputs_of(task, 1), inputs_of(task, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert ("prenet_kept" in first) == any(not torch.equal(first[name], other[name]) for name in first)


def test_batches_are_cut_to_their_longest_row(task: SpeechTask) -> None:
    short = task.validation_batches(1)[2]
    inputs = task.make_inputs(short, torch.Generator())
    assert inputs["input_ids"].shape == (1, 3)
    assert inputs["attention_mask"].all()
    if "log_mel" in inputs:
        assert inputs["log_mel"].shape == (1, 8, 80)
        assert inputs["log_mel"].dtype == torch.float32


def test_calibration_and_batches_come_from_the_source(task: SpeechTask) -> None:
    assert task.steps_per_epoch(2) == 3
    assert [len(batch["input_ids"]) for batch in task.calibration_batches(5, 2)] == [2, 2, 1]
    assert len(next(iter(task.train_stream(4, 0)))["speaker"]) == 4


def test_a_teacher_in_half_precision_predicts_and_speaks_nearly_the_same(task: SpeechTask, teacher: nn.Module) -> None:
    half, inputs = copy.deepcopy(teacher).bfloat16(), inputs_of(task)
    with torch.no_grad():
        outputs, halves = task.predict(teacher, inputs), task.predict(half, inputs)
    for name, output in outputs.items():
        assert torch.allclose(halves[name].float(), output, atol=0.05 * float(output.abs().max())), name
    spoken = synthesize(half, tokenize, TEXTS[2:], some_speech().speakers[2:])
    assert spoken[0].dtype == torch.float32
    assert "log_mel" in encode_speech(half, tokenize, some_speech()).columns or "duration" in inputs


def test_speech_does_not_depend_on_the_batch_and_leaves_no_trace(teacher: nn.Module) -> None:
    speakers, before = some_speech().speakers, torch.get_rng_state()
    together = synthesize(teacher, tokenize, TEXTS, speakers, seed=3)
    alone = synthesize(teacher, tokenize, TEXTS, speakers, seed=3, batch_size=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not teacher.training
    for first, second in zip(together, alone, strict=True):
        # A random SpeechT5 speaks up to a limit that the longest text of a batch sets; the postnet smooths over the end.
        size = len(second) if len(first) == len(second) else len(second) - 8
        assert size >= 3 and torch.allclose(first[:size], second[:size], atol=1e-4)


def test_a_student_in_training_mode_speaks_as_in_evaluation(teacher: nn.Module) -> None:
    student = copy.deepcopy(teacher).train()
    mels = synthesize(student, tokenize, TEXTS[2:], some_speech().speakers[2:])
    assert student.training
    assert torch.equal(mels[0], synthesize(teacher, tokenize, TEXTS[2:], some_speech().speakers[2:])[0])


def test_layers_have_the_families_and_exceptions_of_the_table(teacher: nn.Module) -> None:
    rows = {row.name: row for row in describe(make_student(teacher), speech_architecture_of(teacher).families).rows}
    last = rows["speech_decoder_postnet.feat_out"].spec
    assert last is not None and last.weight.bits == 4 and last.activation is not None and last.activation.bits == 16
    for name, row in rows.items():
        if row.spec is None:
            assert "Conv1d" in row.type_name or "prob_out" in name or "predictor.linear" in name, name
        is_attention = any(part in name for part in ("attn.", "attention."))
        is_block = any(
            part in name for part in ("wrapped_encoder.layers", "wrapped_decoder.layers", "conformer_layers")
        )
        assert (row.family == "Attn") == is_attention, name
        assert (row.family != "-") == is_block, name
        assert not is_block or (row.family == "FF") == ("feed_forward" in name), name


@pytest.mark.parametrize("family", ["Attn", "TF"])
def test_a_family_is_trained_alone(teacher: nn.Module, family: str) -> None:
    student = copy.deepcopy(teacher).requires_grad_(True)
    families = speech_architecture_of(student).families
    quantize_(student, families=families, train=family)
    moving = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert moving and all(families.contains(family, name) for name in moving)


def test_the_teachers_history_is_the_recorded_speech(speecht5: Any) -> None:
    """`predict` is transformers' own forward pass on labels, with the same dropout mask for every sample."""
    task = SpeechTask(speecht5, speech_source(speecht5, tokenize, some_speech(), some_speech()))
    inputs = dict(inputs_of(task))
    steps, units = inputs["prenet_kept"].shape[2:]
    torch.manual_seed(5)
    masks = [torch.bernoulli(torch.zeros(steps, units), p=0.5) == 1 for _ in range(2)]
    inputs["prenet_kept"] = torch.stack(masks)[None].expand(3, -1, -1, -1)
    valid = task.architecture.calls.masks(inputs)["spectrogram"]
    torch.manual_seed(5)
    with torch.no_grad():
        own = speecht5(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            speaker_embeddings=inputs["speaker"],
            labels=inputs["log_mel"].masked_fill(~valid[..., None], -100.0),
        )
        ours = task.predict(speecht5, inputs)
    assert torch.allclose(own.spectrogram, ours["refined"], atol=1e-5)


def test_half_of_the_prenet_is_kept_and_which_half_matters(speecht5: nn.Module) -> None:
    task = SpeechTask(speecht5, speech_source(speecht5, tokenize, some_speech(), some_speech()))
    first, second = inputs_of(task, 1), inputs_of(task, 2)
    assert abs(float(first["prenet_kept"].float().mean()) - 0.5) < 0.03
    assert not torch.equal(first["prenet_kept"][0], first["prenet_kept"][1])
    with torch.no_grad():
        outputs = [task.predict(speecht5, inputs)["refined"] for inputs in (first, first, second)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_recordings_are_cut_to_whole_decoder_steps(speecht5: nn.Module) -> None:
    rows = encode_speech(speecht5, tokenize, some_speech())
    assert rows.columns["num_frames"].tolist() == [20, 34, 8]
    assert rows.columns["log_mel"].shape[1] % 2 == 0


def test_fastspeech2_is_taught_what_it_would_say_itself() -> None:
    """With the teacher's own durations, pitch and energy the taught frames are the freely spoken ones (no padding)."""
    teacher = tiny_model("FastSpeech2ConformerModel")
    speech = Speech(TEXTS[1:2], (), some_speech().speakers[1:2])
    task = SpeechTask(teacher, speech_source(teacher, tokenize, speech, speech))
    with torch.no_grad():
        taught = task.predict(teacher, inputs_of(task))
    spoken = synthesize(teacher, tokenize, speech.texts, speech.speakers)[0]
    assert torch.allclose(taught["refined"][0], spoken, atol=1e-5)


def test_fastspeech2_does_not_attend_to_padded_frames() -> None:
    teacher: Any = tiny_model("FastSpeech2ConformerModel")
    task = SpeechTask(teacher, speech_source(teacher, tokenize, some_speech(), some_speech()))
    inputs, seen = inputs_of(task), []
    handle = teacher.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        task.predict(teacher, inputs)
    handle.remove()
    wanted = task.architecture.calls.masks(inputs)["spectrogram"]
    assert not wanted.all()
    assert torch.equal(seen[0][:, 0].bool(), wanted)


def test_the_seed_decides_what_the_prenet_drops_while_speaking(speecht5: nn.Module) -> None:
    speakers = some_speech().speakers[2:]
    first = synthesize(speecht5, tokenize, TEXTS[2:], speakers, seed=1)[0]
    torch.manual_seed(77)
    assert torch.equal(synthesize(speecht5, tokenize, TEXTS[2:], speakers, seed=1)[0], first)
    assert not torch.allclose(synthesize(speecht5, tokenize, TEXTS[2:], speakers, seed=2)[0], first, atol=1e-4)


def test_unfit_data_is_refused(speecht5: nn.Module) -> None:
    speech = some_speech()
    with pytest.raises(ConfigError, match=r"speech\.speakers = \(3, 4\) .* \[N, 8\]"):
        encode_speech(speecht5, tokenize, Speech(speech.texts, speech.log_mels, speech.speakers[:, :4]))
    with pytest.raises(ConfigError, match=r"speech\.log_mels = 'none' .* teacher's 80 bands"):
        encode_speech(speecht5, tokenize, Speech(speech.texts, (), speech.speakers))
    bands = tuple(mel[:, :40] for mel in speech.log_mels)
    with pytest.raises(ConfigError, match=r"speech\.log_mels = '40 bands'"):
        encode_speech(speecht5, tokenize, Speech(speech.texts, bands, speech.speakers))
    with pytest.raises(ConfigError, match="one row for each of 3 texts"):
        synthesize(speecht5, tokenize, TEXTS, speech.speakers[:2])


def test_an_unknown_class_says_what_to_add() -> None:
    with pytest.raises(ModelError, match=r'class Linear has no entry .* add "Linear": SpeechArchitecture\('):
        SpeechTask(nn.Linear(2, 2), None)  # type: ignore[arg-type]


def test_sound_needs_the_models_own_vocoder_only_where_spectrograms_are_its_own(teacher: nn.Module) -> None:
    mels = (torch.randn(6, 80) - 2,)
    if speech_architecture_of(teacher).mel is None:
        with pytest.raises(ConfigError, match=r"vocoder = None .* FastSpeech2ConformerHifiGan"):
            to_waveforms(teacher, mels)
    else:
        assert to_waveforms(teacher, mels)[0].shape == (5 * 256,)


def test_a_given_vocoder_makes_the_sound(speecht5: nn.Module) -> None:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    sizes = {"upsample_rates": [4, 8], "upsample_kernel_sizes": [8, 16], "resblock_kernel_sizes": [3]}
    config = SpeechT5HifiGanConfig(upsample_initial_channel=16, resblock_dilation_sizes=[[1]], **sizes)
    waveforms = to_waveforms(speecht5, (torch.randn(6, 80), torch.randn(4, 80)), SpeechT5HifiGan(config).eval())
    assert [waveform.shape for waveform in waveforms] == [(6 * 32,), (4 * 32,)]


@pytest.mark.parametrize(
    ("class_name", "num_parameters", "num_quantized", "share"),
    [
        ("SpeechT5ForTextToSpeech", 144_431_684, 137, 0.990),
        ("FastSpeech2ConformerModel", 70_262_259, 41, 0.084),  # the rest are convolutions of width 3 and more
    ],
)
def test_the_published_sizes_are_quantized_as_the_table_says(
    class_name: str, num_parameters: int, num_quantized: int, share: float
) -> None:
    with torch.device("meta"):
        model = build_speech_model(class_name, {})
    architecture = SPEECH_ARCHITECTURES[class_name]
    report = quantize_(model, rules=architecture.default_rules(), families=architecture.families)
    assert report.num_model_parameters == num_parameters
    assert len(report.quantized) == num_quantized
    assert report.num_quantized_weights / num_parameters == pytest.approx(share, abs=0.001)
