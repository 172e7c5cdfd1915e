"""Known notices of torchao's import are dropped, and nothing else is."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from fraqat.quiet import drop_torchao_notices

NOTICES = [
    ("torchao", "Failed to load /x/site-packages/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load"),
    (
        "torch.utils._pytree",
        "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch.compile as an opaque value "
        "type. Calling register_constant() on Enum subclasses is deprecated",
    ),
    (
        "diffusers.quantizers.torchao.torchao_quantizer",
        "Unable to import `torchao` Tensor objects. This may affect loading checkpoints serialized with `torchao`",
    ),
]


@pytest.mark.parametrize(("name", "message"), NOTICES)
def test_a_known_notice_is_dropped_and_others_are_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    drop_torchao_notices()
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=name):
        logger.warning(message)
        assert caplog.messages == []
        logger.warning("something else about %s", name)
    assert caplog.messages == [f"something else about {name}"]


def test_importing_the_pipelines_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fraqat.tasks.pipelines"], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
