"""The parts of exported models in ONNX Runtime against PyTorch, and the examples that use them without PyTorch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from fraqat.config import load_recipe
from fraqat.data.speech_signal import LogMelSpec, mel_filters
from fraqat.export import Inputs, Outputs, Part
from fraqat.nn import quantized_layers
from fraqat.workflows.sessions import open_session

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "a green three on yellow"
PHRASE = "good morning"
LAYER_DB = 100.0
WHOLE_DB = 30.0
Sqnr = Callable[[Tensor, Tensor], float]


def run_example(name: str, *arguments: str | Path) -> str:
    """Runs an example where PyTorch cannot be imported. Returns what it prints."""
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def computed(part: Part, inputs: Inputs) -> dict[str, Tensor]:
    """What PyTorch gives."""
    with torch.no_grad():
        found: Any = part.module(**inputs)
    return dict(zip(part.outputs, (found,) if isinstance(found, Tensor) else found, strict=True))


def some_rows(part: Part, inputs: Inputs, num: int) -> dict[str, Tensor]:
    """The first rows of a batch."""
    has_batch = {name for name, axes in part.dynamic_axes.items() if axes.get(0) == "batch"}
    return {name: value[:num].contiguous() if name in has_batch else value for name, value in inputs.items()}


def assert_near(found: dict[str, Tensor] | Any, wanted: dict[str, Tensor], bound_db: float, sqnr_db: Sqnr) -> None:
    """Every output is at least so near."""
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert sqnr_db(value, found[name]) >= bound_db, name


def layer_errors(exported: Any, part: Part, found: Outputs, sqnr_db: Sqnr) -> dict[str, float]:
    """SQNR of every layer of a part on the input that ONNX Runtime gave it."""
    layers = dict(quantized_layers(exported.student))
    with torch.no_grad():
        return {name: sqnr_db(layers[name](found.layer_inputs[name]), value) for name, value in found.layers.items()}


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-sana")
class TestSana:
    def test_unquantized_parts_equal_pytorch_at_any_batch_size(self, sana: Any, sqnr_db: Sqnr) -> None:
        for name in ("text_encoder", "decoder"):
            part = sana.part(name)
            inputs = part.batches()[-1]
            for num in (len(next(iter(inputs.values()))), 1):
                rows = some_rows(part, inputs, num)
                assert_near(sana.opened.run(part, rows).outputs, computed(part, rows), LAYER_DB, sqnr_db)

    def test_layers_equal_pytorch_given_the_same_input(self, sana: Any, sqnr_db: Sqnr) -> None:
        part = sana.part("transformer")
        rows = some_rows(part, part.batches()[-1], 3)
        found = sana.opened.run(part, rows)
        errors = layer_errors(sana, part, found, sqnr_db)
        assert len(errors) == len(dict(quantized_layers(sana.student)))
        assert min(errors.values()) >= LAYER_DB
        assert_near(found.outputs, computed(part, rows), WHOLE_DB, sqnr_db)

    def test_example_samples_the_pipelines_picture_without_torch(self, sana: Any, tmp_path: Path) -> None:
        shape = sana.part("transformer").constants["latent_shape"]
        noise = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
        np.save(tmp_path / "noise.npy", noise)
        picture = tmp_path / "picture.png"
        run_example("sample_without_torch.py", sana.folder, PROMPT, picture, "--noise", tmp_path / "noise.npy")
        found = np.asarray(Image.open(picture), np.float64) / 255
        wanted = pipeline_picture(sana, noise)
        assert found.shape == wanted.shape
        assert -10 * math.log10(((found - wanted) ** 2).mean()) > WHOLE_DB

    def test_parts_file_describes_what_the_graphs_take(self, sana: Any) -> None:
        described = json.loads((sana.folder / "parts.json").read_text(encoding="utf-8"))
        assert list(described) == ["transformer", "text_encoder", "decoder"]
        assert described["transformer"]["inputs"]["hidden_states"] == {"shape": ["batch", 8, 8, 8], "dtype": "float32"}
        facts = described["text_encoder"]["constants"]["tokenizers"]["tokenizer"]
        assert (facts["max_length"], facts["pad_token_id"], facts["padding_side"]) == (16, 0, "right")
        assert (sana.folder / facts["file"]).is_file()
        steps = described["transformer"]["constants"]
        assert len(steps["coefficients"]) == len(steps["timesteps"]) + 1 == sana.session.recipe.sampler.num_steps + 1


def pipeline_picture(sana: Any, noise: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The picture [height, width, 3] that the student's pipeline samples."""
    from fraqat.tasks.conditioning import call_pipeline
    from fraqat.tasks.image_parts import with_arguments

    sampler = sana.session.recipe.sampler
    pipeline = sana.session.open_pipeline(sana.student)
    with torch.no_grad():
        images = call_pipeline(
            pipeline,
            [PROMPT],
            with_arguments(sampler, latents=torch.from_numpy(noise)[None]),
            guidance_scale=sampler.guidance_scale,
            generators=[torch.Generator()],
            output_type="pt",
        ).images
    return images[0].permute(1, 2, 0).double().numpy()


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-gemma")
class TestGemma:
    def test_cache_and_logits_equal_pytorch_at_any_length(self, gemma: Any, sqnr_db: Sqnr) -> None:
        part = gemma.part("model")
        rows = gemma.session.task.calibration_batches(3, 3)[0]["input_ids"]
        for num_past, num_tokens in ((0, 7), (1, 2), (5, 6)):
            inputs = part.module.inputs_after(rows[:, :num_tokens], num_past)
            found = gemma.opened.run(part, inputs)
            assert_near(found.outputs, computed(part, inputs), WHOLE_DB, sqnr_db)
            assert min(layer_errors(gemma, part, found, sqnr_db).values()) >= LAYER_DB

    def test_step_equals_the_model_without_a_cache(self, gemma: Any, sqnr_db: Sqnr) -> None:
        rows = gemma.session.task.calibration_batches(2, 2)[0]["input_ids"][:, :40]
        with torch.no_grad():
            wanted = gemma.student(input_ids=rows, use_cache=False).logits[:, -1]
            found = gemma.part("model").module(**gemma.part("model").module.inputs_after(rows, 30))[0]
        assert sqnr_db(wanted, found) > WHOLE_DB

    def test_example_writes_the_students_text_without_torch(self, gemma: Any) -> None:
        prompt, tokens = "The with statement", 12
        found = run_example("generate_text_without_torch.py", gemma.folder, prompt, "--max-new-tokens", str(tokens))
        from fraqat.tasks.language import generate_text

        wanted = generate_text(gemma.student, gemma.session.tokenizer, [prompt], max_new_tokens=tokens)[0]
        assert found == wanted + "\n"


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-speecht5")
class TestSpeechT5:
    def test_parts_equal_pytorch_at_any_size(self, speecht5: Any, sqnr_db: Sqnr) -> None:
        for part in speecht5.parts:
            for inputs in (part.batches()[-1], some_rows(part, part.batches()[0], 1)):
                found = speecht5.opened.run(part, inputs)
                assert_near(found.outputs, computed(part, inputs), WHOLE_DB, sqnr_db)
                assert min(layer_errors(speecht5, part, found, sqnr_db).values(), default=LAYER_DB) >= LAYER_DB

    def test_parts_hold_every_quantized_layer(self, speecht5: Any) -> None:
        shown = {name for part in speecht5.parts for name in speecht5.opened.run(part, part.batches()[0]).layers}
        assert shown == set(dict(quantized_layers(speecht5.student)))

    def test_example_speaks_as_the_student_without_torch(
        self, speecht5: Any, sqnr_db: Sqnr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(EXAMPLES)
        import speak_without_torch

        export = speak_without_torch.Export(speecht5.folder)
        kept_DlU = speak_without_torch.draw_kept(export, 200, seed=0)
        found = torch.from_numpy(speak_without_torch.speak(export, PHRASE, kept_DlU))
        wanted = spoken_with(speecht5, torch.from_numpy(kept_DlU))
        assert sqnr_db(wanted, found) > WHOLE_DB
        run_example("speak_without_torch.py", speecht5.folder, PHRASE, tmp_path / "speech.wav")
        with wave.open(str(tmp_path / "speech.wav")) as stream:
            assert stream.getframerate() == speecht5.session.architecture.sample_rate
            assert stream.getnframes() == (len(wanted) - 1) * speecht5.session.architecture.mel.hop_length

    def test_example_hears_the_same_bands_as_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(EXAMPLES)
        import speak_without_torch

        spec = LogMelSpec()
        found = speak_without_torch.mel_filters(dataclasses.asdict(spec))
        assert np.allclose(found, mel_filters(spec).numpy(), atol=1e-6)


def spoken_with(speecht5: Any, kept_DlU: Tensor) -> Tensor:
    """The student's own speech [L, M] where the prenet keeps the given units."""
    model = speecht5.student
    prenet, calls = model.speecht5.decoder.prenet, itertools.count()
    num_layers = kept_DlU.shape[1]

    def dropout(hidden: Tensor, p: float) -> Tensor:
        kept = kept_DlU[: hidden.shape[1], next(calls) % num_layers]
        return torch.where(kept, hidden, 0) / (1 - p)

    prenet.__dict__["_consistent_dropout"] = dropout
    speaker = torch.tensor([speecht5.part("decoder").constants["speaker"]])
    tokens = speecht5.session.tokenize([PHRASE])
    try:
        return model.generate(tokens["input_ids"], attention_mask=tokens["attention_mask"], speaker_embeddings=speaker)
    finally:
        del prenet.__dict__["_consistent_dropout"]


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-speecht5")
def test_vocoder_that_a_recipe_names_is_a_part(tmp_path: Path, sqnr_db: Sqnr) -> None:
    pytest.importorskip("onnxscript")
    from fraqat.export.onnx.graph import save, trace
    from fraqat.export.onnx.runtime import open_session as open_graph

    sizes = {"upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8], "resblock_kernel_sizes": [3]}
    config = SpeechT5HifiGanConfig(upsample_initial_channel=32, resblock_dilation_sizes=[[1, 3]], **sizes)
    SpeechT5HifiGan(config).save_pretrained(tmp_path / "vocoder")
    session = open_session(load_recipe("speecht5-tiny", (f"evaluation.vocoder={tmp_path / 'vocoder'}",)))
    part = session.export_parts(session.teacher)[-1]
    assert part.name == "vocoder"
    save(trace(part, session.teacher), tmp_path / "vocoder.onnx")
    graph = open_graph(tmp_path / "vocoder.onnx")
    for num_frames in (30, 11):
        inputs = {"spectrogram": torch.randn(num_frames, 80)}
        found = torch.from_numpy(graph.run(None, {"spectrogram": inputs["spectrogram"].numpy()})[0])
        assert sqnr_db(computed(part, inputs)["waveform"], found) > LAYER_DB
