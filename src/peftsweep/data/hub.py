"""The Hugging Face hub. Whether it answers is found out once, before a library waits for it.

If the hub does not answer, the libraries that load from it retry for minutes, for each file anew.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from peftsweep.errors import InputError, say_once

HUB_TIMEOUT_SECONDS = 4.0  # seconds without an answer, after which the hub counts as unreachable
GATEWAY_ERRORS = (502, 503, 504)  # statuses of a proxy in front of the hub
NOT_FOUND = 404
COMMIT = re.compile(r"[0-9a-f]{40}")


@functools.cache
def problem() -> str | None:
    """Why nothing can be loaded from the hub, as text; None if the hub answers.

    If it does not answer, this process uses only the local cache from now on.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 is set"
    found: list[str | None] = []
    # A thread, because no timeout of the client covers the DNS look-up of the host.
    asking = Thread(target=lambda: found.append(_ask(constants.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_SECONDS)
    reason = found[0] if found else f"no answer in {HUB_TIMEOUT_SECONDS:g} seconds"
    if reason is None:
        return None
    go_offline()
    return f"{constants.ENDPOINT} cannot be reached ({reason})"


def _ask(endpoint: str) -> str | None:
    """The reason why ``endpoint`` does not answer; None if it answers, with any status but a gateway's error."""
    from huggingface_hub import get_session

    session: Any = get_session()  # uses the proxies and certificates that are set
    try:
        status = session.head(endpoint, timeout=HUB_TIMEOUT_SECONDS).status_code
    except Exception as error:  # its type depends on the client's HTTP library
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"status {status}" if status in GATEWAY_ERRORS else None


def go_offline() -> None:
    """Make this process, and all processes that it starts, load from the local cache only."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_HUB_OFFLINE = True


def is_offline() -> bool:
    """Whether this process loads from the local cache only."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@functools.cache
def config_of_model(name: str, revision: str | None) -> Path:
    """The config.json of a model in the local cache, in the folder that has its commit as name.

    A revision, by default the main branch, is resolved once in a process, so that everything is loaded from one commit
    even if the branch moves. If the hub does not answer, the commit in the local cache is taken.

    Raises:
        OSError, or another error of the client: neither the hub nor the cache has a config.json of the model.
    """
    import huggingface_hub

    problem()
    return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))


def commit_in_cache(name: str, kind: str, revision: str | None) -> str | None:
    """The commit of a repository's revision when it was last loaded; ``kind`` is model or dataset.

    None if it is not in the local cache.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(folder).name


def check_access(name: str, revision: str | None) -> None:
    """Check that the hub gives access to a dataset.

    Raises:
        OSError, or another error of the client: there is no such repository or revision, or it is gated.
    """
    from huggingface_hub import HfApi

    if HfApi().repo_info(name, revision=revision, repo_type="dataset").gated:
        HfApi().auth_check(name, repo_type="dataset")


@contextmanager
def loading(what: str, instead: str, choices: str = "") -> Iterator[None]:
    """Turn errors of loading ``what``, a key with a name on the hub, in the body into one clear message.

    The message offers ``instead`` in its place. For errors that are not the hub's own answers it ends with
    ``choices``, the keys that choose a part of a repository.

    Raises:
        InputError: it cannot be loaded.
    """
    offline, unreachable = is_offline(), problem()
    try:
        yield
        if unreachable and not offline:
            say_once(f"{unreachable}: what is in the local cache is used")
    except InputError:
        raise
    except Exception as error:  # the HTTP client, its cache and parsers raise types of their own
        if unreachable is None:
            answered, first = _answer(error), _first(error)
            message = " ".join(str(first).partition("Example of usage")[0].split()) or type(first).__name__
            reason = f"({answered})" if answered else f"({message[:200]}){choices}"
            raise InputError(f"{what}: cannot be loaded {reason}; {instead} can be given instead") from error
        raise InputError(
            f"{what}: is not in the local cache, and {unreachable}; give {instead}, or download it where there is a "
            "network"
        ) from error


def _first(error: BaseException) -> BaseException:
    """The first cause of ``error``."""
    return error if error.__cause__ is None else _first(error.__cause__)


def _answer(error: BaseException) -> str | None:
    """The hub's answer among the causes of ``error``, with advice; None if the hub did not answer with an error."""
    from huggingface_hub import errors

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    log_in = "log in (hf auth login, or HF_TOKEN)"
    for found in causes:
        if isinstance(found, errors.GatedRepoError):
            return f"it is gated: accept its terms on its hub page, then {log_in}"
        if isinstance(found, errors.RepositoryNotFoundError):
            return f"the hub has no repository of this name, or it is private: then {log_in}"
        if isinstance(found, errors.RevisionNotFoundError):
            return "it has no such revision; must be a branch, a tag or a whole commit"
    for found in causes:
        status = getattr(getattr(found, "response", None), "status_code", 0)
        if isinstance(found, errors.EntryNotFoundError) and status == NOT_FOUND:
            return "it holds no config.json; if it is an adapter, download it and give adapter.path=FOLDER"
        if isinstance(found, errors.HfHubHTTPError) and status != NOT_FOUND:
            again = "run the same command again later, or with HF_HUB_OFFLINE=1 from the local cache"
            return f"the hub answers with status {status}; {again}"
    return None
