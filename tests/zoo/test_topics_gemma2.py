"""The language model of the zoo is what its card says, and its training can be interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fraqat.data.topics import HELD_OUT_TOPICS, topic_texts
from fraqat.zoo import topics_training, zoo_path
from fraqat.zoo.merge_dropout import MergeDropout
from fraqat.zoo.topics_training import TopicsSettings, encode_documents, mean_nats, train_topics

FOLDER = zoo_path("topics-gemma2")
TEXT = 'The "with" statement – naïve, 文字,\n   >>> x = {1: "two"}\t# 😀\n'
pytestmark = pytest.mark.xdist_group("topics")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads((FOLDER / "quality.json").read_text())


def test_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_500_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_it_is_a_gemma_2_with_everything_that_makes_one(model: Any) -> None:
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.attn_logit_softcapping and model.config.final_logit_softcapping
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 32 == 0 and module.out_features % 32 == 0, name


def test_any_text_comes_back_from_the_tokenizer(tokenizer: Any) -> None:
    tokens = tokenizer(TEXT)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == TEXT


def test_it_clearly_beats_the_best_ngram_models(figures: dict[str, Any]) -> None:
    ours, tokens, bytes_ = (figures[name] for name in ("model", "token_ngram", "byte_ngram"))
    assert ours["perplexity"] < 0.85 * tokens["perplexity"]
    assert ours["bits_per_byte"] < 0.95 * min(tokens["bits_per_byte"], bytes_["bits_per_byte"])
    for topic in HELD_OUT_TOPICS:
        assert ours["topic_bits_per_byte"][topic] < tokens["topic_bits_per_byte"][topic], topic


def test_the_stored_weights_reach_the_figures(model: Any, tokenizer: Any, figures: dict[str, Any]) -> None:
    texts = topic_texts()
    place = HELD_OUT_TOPICS.index("raise")
    text = texts.held_out[place]
    (document,) = encode_documents(tokenizer, [text])
    nats = len(document) * mean_nats(model, [document], start=tokenizer.bos_token_id, context=256)
    found = nats / len(text.encode()) / math.log(2)
    assert found < figures["token_ngram"]["topic_bits_per_byte"]["raise"]
    if texts.sha256 == figures["text_sha256"]:  # other versions of Python have another text
        assert found == pytest.approx(figures["model"]["topic_bits_per_byte"]["raise"], abs=2e-3)


def test_figures_and_licences_are_on_the_card(figures: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text()
    assert f"{figures['model']['perplexity']:.2f}" in card
    assert f"{figures['token_ngram']['perplexity']:.2f}" in card
    assert "Apache-2.0" in card and "PSF License Agreement" in card


def test_code_on_the_card_runs_and_gives_what_it_says() -> None:
    card = (FOLDER / "README.md").read_text()
    names: dict[str, Any] = {"folder": FOLDER}
    exec(card.split("```python\n")[1].split("```")[0], names)
    said = card.split("```text\n")[1].split("\n```")[0]
    assert names["text"].split()[:12] == said.split()[:12]  # bfloat16 may round otherwise on another processor


def test_windows_count_every_token_once(model: Any, tokenizer: Any) -> None:
    (document,) = encode_documents(tokenizer, ["The value is an object, and the object is a value of its class."])
    start = tokenizer.bos_token_id
    row = torch.tensor([[start, *document]])
    with torch.no_grad():
        nats = F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="none")
    whole = mean_nats(model, [document], start=start, context=64)
    assert whole == pytest.approx(nats.mean().item(), rel=1e-5)
    context, total = 8, 0.0
    for place in range(len(document)):  # each token's own window, by hand
        begin = 0 if place < context - 1 else context // 2 * ((place - context + 1) // (context // 2) + 1)
        with torch.no_grad():
            logits = model(input_ids=row[:, begin : place + 1]).logits[0, -1]
        total -= logits.log_softmax(-1)[row[0, place + 1]].item()
    assert mean_nats(model, [document], start=start, context=context) == pytest.approx(total / len(document), rel=1e-4)


def test_without_dropout_merges_are_the_tokenizers(tokenizer: Any) -> None:
    texts = [*topic_texts().validation[:1], TEXT]
    backend = tokenizer.backend_tokenizer
    assert MergeDropout(backend, 0.0).encode(texts, seed=0) == encode_documents(tokenizer, texts)
    dropped = MergeDropout(backend, 0.3).encode(texts, seed=0)
    assert [tokenizer.decode(tokens) for tokens in dropped] == texts
    assert len(dropped[0]) > 1.1 * len(encode_documents(tokenizer, texts)[0])
    assert (
        MergeDropout(backend, 0.3).encode(texts, seed=0) == dropped != MergeDropout(backend, 0.3).encode(texts, seed=1)
    )


def tiny_model() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma2Config(vocab_size=1024, num_key_value_heads=1, head_dim=16, **sizes)
    return Gemma2ForCausalLM(config)


def test_resumed_training_equals_uninterrupted_training(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TopicsSettings(num_steps=4, batch_size=2, row_tokens=16, num_warmup_steps=1, evaluate_every=2)
    train, validation = (TEXT * 30, "for and while, if and else. " * 30), ("while and for " * 5,)
    whole, resumed = tiny_model(), tiny_model()
    result = train_topics(whole, tokenizer, train, validation, settings, tmp_path / "whole.pt")
    assert result.num_steps == 4
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    save = topics_training._Run.save

    def save_and_stop(run: Any, path: Path) -> None:
        save(run, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(topics_training._Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_topics(resumed, tokenizer, train, validation, settings, tmp_path / "parts.pt")
    monkeypatch.setattr(topics_training._Run, "save", save)
    torch.manual_seed(99)
    again = train_topics(tiny_model(), tokenizer, train, validation, settings, tmp_path / "parts.pt")
    assert again.validation_nats == result.validation_nats
    final = tiny_model()
    train_topics(final, tokenizer, train, validation, settings, tmp_path / "parts.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), final.parameters(), strict=True))


def test_training_stops_when_validation_gets_no_better(tokenizer: Any, tmp_path: Path) -> None:
    settings = TopicsSettings(
        num_steps=40, batch_size=2, row_tokens=16, learning_rate=0.5, num_warmup_steps=1, evaluate_every=1, patience=2
    )
    result = train_topics(tiny_model(), tokenizer, (TEXT * 30,), ("while and for " * 5,), settings, tmp_path / "run.pt")
    stopped = torch.load(tmp_path / "run.pt", weights_only=True)["step"]
    assert stopped == result.num_steps + 2 < 40
