"""Files of data sets on the Hugging Face hub, and errors of the hub's libraries in words that say what to do.

The libraries are loaded only where something is downloaded, and their errors are told apart by the names of their classes.
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType

from fraqat.errors import ConfigError, FraqatError, config_error

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KNOWN_CLASSES = frozenset({"DatasetsError", "ArrowException", "HTTPError"})
_MAX_SHOWN = 300
_RETRIES = 2


def is_hub_id(path: str) -> bool:
    """Whether a text has the form of a hub id, `owner/name` or `name`."""
    return _HUB_ID.fullmatch(path) is not None


def snapshot(field: str, path: str, revision: str | None, files: str | None) -> str:
    """Downloads files of a data set, if they are not here yet.

    Args:
        field: Field of the recipe that has the path.
        path: Hub id.
        revision: Branch, tag or commit.
        files: Glob pattern; None takes everything.

    Returns:
        The folder with the files, named after the commit.

    Raises:
        ConfigError: The data set is missing, gated or out of reach.
    """
    with explain_hub_errors(field, path, revision):
        return _hub().snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=files)


def why_no_answer() -> str | None:
    """Why the hub cannot be reached; None where it answers, or where it is not to be asked.

    The libraries ask six times for a file that is not in the cache, which takes half a minute where connections are refused;
    this asks three times within three seconds, before they do. Where nothing answers, each time takes `HF_HUB_ETAG_TIMEOUT`.
    """
    _hub()
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils import http_backoff

    if is_offline_mode():
        return None
    try:
        http_backoff(
            "HEAD",
            constants.ENDPOINT,
            max_retries=_RETRIES,
            retry_on_status_codes=(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except (OSError, *transport_errors()) as error:
        return _shown(error)
    return None


def transport_errors() -> tuple[type[Exception], ...]:
    """What the hub's library lets through when there is no network; it builds on httpx, under either of its names."""
    modules = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return tuple(module.TransportError for module in modules)


def check_answers(field: str, path: str) -> None:
    """Refuses a data set that is not here where the hub cannot be reached, before the libraries ask it again and again.

    Args:
        field: Field of the recipe that has the path.
        path: Hub id of a data set that is in no cache.

    Raises:
        ConfigError: There is no network.
    """
    if (cause := why_no_answer()) is None:
        return
    from huggingface_hub import constants

    raise ConfigError(
        f"{field} = {path!r} cannot be had: it is not in the local cache, and {constants.ENDPOINT} cannot be reached "
        f"({cause}). Fix: {_no_network_advice(path)}."
    )


@contextmanager
def explain_hub_errors(field: str, path: str, revision: str | None) -> Generator[None]:
    """Turns what the libraries raise into one `ConfigError` that says what to do.

    Args:
        field: Field of the recipe that has the path.
        path: Hub id or local path.
        revision: Of a hub id.
    """
    try:
        yield
    except Exception as error:  # of libraries that are not imported here, told by name; all others go on as they are
        if isinstance(error, FraqatError | ModuleNotFoundError) or not _is_known(error):
            raise
        advice = _advice(error, field, path, revision)
        raise ConfigError(f"{field} = {path!r} cannot be read: {_shown(error)}. Fix: {advice}.") from error


def _shown(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:_MAX_SHOWN] or type(error).__name__


def _no_network_advice(path: str) -> str:
    return f"check the network, or set the path to a local copy; there is no local folder {path!r} here"


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise config_error(
            "data.records", "a hub id", allowed="local files without huggingface_hub", fix="pip install 'fraqat[data]'"
        ) from None
    return huggingface_hub


def _is_known(error: BaseException) -> bool:
    if isinstance(error, OSError | ValueError | RuntimeError | tarfile.TarError):
        return True
    return not _KNOWN_CLASSES.isdisjoint(_class_names([error]))


def _advice(error: BaseException, field: str, path: str, revision: str | None) -> str:
    causes, section = _chain(error), field.rpartition(".")[0]
    text, names = " ".join(str(cause) for cause in causes), _class_names(causes)
    if "GatedRepoError" in names or "is a gated dataset" in text:
        return (
            f"accept the terms on https://huggingface.co/datasets/{path} in your browser, then run `hf auth login` here"
        )
    if "RevisionNotFoundError" in names or text.startswith("Revision"):
        return f"correct {section}.revision = {revision!r}"
    if "OfflineModeIsEnabled" in names or "offline" in text.lower():
        return f"unset HF_HUB_OFFLINE, or set the path to a local copy; there is no local folder {path!r} here"
    if "RepositoryNotFoundError" in names or "doesn't exist on the Hub" in text:
        return "correct the hub id or the local path; for a private data set run `hf auth login` first"
    if names & {"ConnectionError", "HTTPError", "LocalEntryNotFoundError"}:
        return _no_network_advice(path)
    if "BuilderConfig" in text or "onfig name is missing" in text:
        return f"set {section}.name to one of the configurations named here"
    if "scripts are no longer supported" in text:
        return "use a copy of the data as parquet files: no code of a data set is ever run"
    if isinstance(error, FileNotFoundError):
        return f"correct {field} or {section}.files"
    return (
        f"a file is damaged or not of the format that its name says: copy it again, or leave it out by {section}.files"
    )


def _class_names(errors: list[BaseException]) -> set[str]:
    return {base.__name__ for error in errors for base in type(error).__mro__}


def _chain(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes
