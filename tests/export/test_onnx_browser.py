"""The page of examples/browser in headless Chromium, against the example in Python."""

from __future__ import annotations

import functools
import http.server
import json
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BROWSER_EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
EXAMPLES = BROWSER_EXAMPLE.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
NODE = shutil.which("node")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT_S = 150
PROMPT = "a green three on yellow"
SAME_PICTURE_DB = 30.0
DRIVER = """
const say = value => fetch("/report", {method: "POST", body: JSON.stringify(value)});
const status = document.querySelector("output"), canvas = document.querySelector("canvas");
const shown = wanted => new Promise((resolve, reject) => {
  const look = () => {
    if (status.textContent.startsWith(wanted)) resolve();
    else if (/Fix:|rror/.test(status.textContent)) reject(new Error(status.textContent));
    else setTimeout(look, 50);
  };
  look();
});
async function drive() {
  await shown("Ready");
  document.querySelector("#prompt").value = PROMPT;
  document.querySelector("#seed").value = "3";
  document.querySelector("button").click();
  await shown("Done");
  const {width, height} = canvas, {drawNoise} = await import("./sample.mjs");
  const pixels = [...canvas.getContext("2d").getImageData(0, 0, width, height).data];
  await say({status: status.textContent, width, height, pixels, noise: [...drawNoise(512, 3)]});
}
drive().catch(error => say({error: String(error.message)}));
"""


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-web: beside the page, or out of npm's cache."""
    beside = BROWSER_EXAMPLE / "node_modules"
    if beside.is_dir():
        return beside
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    shutil.copy(BROWSER_EXAMPLE / "package.json", folder)
    command = (npm, "install", "--offline", "--ignore-scripts", "--no-audit", "--no-fund")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        pytest.skip("onnxruntime-web is not in npm's cache; run npm ci in examples/browser")
    return folder / "node_modules"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and keeps what the page reports."""

    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    reported: dict[str, Any] = {}  # noqa: RUF012
    is_done = threading.Event()

    def do_POST(self) -> None:
        self.reported.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()
        self.is_done.set()

    def log_message(self, *arguments: Any) -> None:
        """Silent."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def drive(folder: Path, address: str) -> dict[str, Any]:
    """Opens the page, presses its button and gives what it shows at the end."""
    Handler.reported.clear()
    Handler.is_done.clear()
    command = (str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", address)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            assert Handler.is_done.wait(TIMEOUT_S), "the page did not finish"
        finally:
            process.terminate()
    return dict(Handler.reported)


def site(folder: Path, export: Path, node_modules: Path) -> Path:
    """The page with an export and a script that presses its button."""
    root = folder / "site"
    shutil.copytree(BROWSER_EXAMPLE, root, ignore=shutil.ignore_patterns("node_modules"))
    (root / "node_modules").symlink_to(node_modules)
    (root / "export").symlink_to(export)
    (root / "driver.mjs").write_text(DRIVER.replace("PROMPT", json.dumps(PROMPT)), encoding="utf-8")
    page = root / "index.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(
        text.replace("</body>", '<script type="module" src="driver.mjs"></script></body>'), encoding="utf-8"
    )
    return root


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
@pytest.mark.xdist_group("onnx-sana")
def test_page_draws_the_picture_of_the_python_example(
    node_modules: Path, sana: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import sample_without_torch

    with served(site(tmp_path, sana.folder, node_modules)) as address:
        shown = drive(tmp_path, f"{address}/index.html")
    assert "error" not in shown, shown["error"]
    pixels = np.array(shown["pixels"]).reshape(shown["height"], shown["width"], 4)
    export = sample_without_torch.Export(sana.folder)
    shape = export.constants("transformer")["latent_shape"]
    wanted = sample_without_torch.sample(export, PROMPT, np.array(shown["noise"], np.float32).reshape(shape))
    assert (pixels[..., 3] == 255).all()
    difference = pixels[..., :3] / 255 - wanted
    assert -10 * math.log10((difference**2).mean()) > SAME_PICTURE_DB


@pytest.mark.skipif(NODE is None, reason="node is not installed")
class TestTokenizer:
    def run(self, file: Path, facts: dict[str, Any], texts: list[str]) -> Any:
        """What the page's tokenizer makes of texts, or its error."""
        code = (
            f"import {{WordTokenizer}} from {json.dumps((BROWSER_EXAMPLE / 'tokenizer.mjs').as_uri())};"
            "import fs from 'node:fs'; const [file, facts, texts] = JSON.parse(process.env.TOKENIZER_TEST);"
            "try { const found = new WordTokenizer(JSON.parse(fs.readFileSync(file)));"
            "console.log(JSON.stringify(texts.map(text => found.encode(text, facts)))); }"
            "catch (error) { console.log(JSON.stringify(error.message)); }"
        )
        environment = {**os.environ, "TOKENIZER_TEST": json.dumps([str(file), facts, texts])}
        command = (str(NODE), "--input-type=module", "-e", code)
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
        return json.loads(result.stdout)

    @pytest.mark.parametrize("source", ["color-digits-sana/tokenizer", "color-digits-sd3/tokenizer"])
    def test_equals_the_tokenizers_library(self, source: str) -> None:
        from tokenizers import Tokenizer

        from fraqat.zoo import zoo_path

        name, _, component = source.partition("/")
        file = zoo_path(name) / component / "tokenizer.json"
        library = Tokenizer.from_file(str(file))
        library.enable_truncation(8)
        library.enable_padding(pad_id=0, pad_token="<pad>", length=8)
        texts = ["a red seven on blue", "", "Seven, seven!", "a a a a a a a a a a a", "  \u00e9t\u00e9-1_2 on\tblue"]
        facts = {"max_length": 8, "pad_token_id": 0, "padding_side": "right", "strips": False, "lowers": False}
        wanted = [{"input_ids": row.ids, "attention_mask": row.attention_mask} for row in library.encode_batch(texts)]
        assert self.run(file, facts, texts) == wanted

    def test_other_kinds_are_refused(self) -> None:
        from fraqat.zoo import zoo_path

        message = self.run(zoo_path("topics-gemma2") / "tokenizer.json", {}, [])
        assert message.startswith(
            "tokenizer.json: model.type = BPE is not possible on this page: allowed is WordLevel."
        )
        assert "Fix: tokenize with a library" in message
