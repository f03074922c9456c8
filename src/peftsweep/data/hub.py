"""The hub of models and datasets: whether it answers, which is asked once, before a library waits for it.

The libraries that load from the hub try again for minutes where it does not answer, once for every file.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from peftsweep.errors import InputError

HUB_TIMEOUT_SECONDS = 4.0  # seconds until a hub that says nothing counts as one that cannot be reached
GATEWAY_ERRORS = (502, 503, 504)  # of a proxy in front of it
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    ImportError,
    RecursionError,
)  # what loading may raise


@functools.cache
def problem() -> str | None:
    """Why nothing can be loaded from the hub, in words; None where it answers.

    Where it does not, this process uses from here on only what is in the local cache.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 is set"
    found: list[str | None] = []
    # A thread, as no timeout of the client covers the look-up of a host's name.
    asking = Thread(target=lambda: found.append(_ask(constants.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_SECONDS)
    reason = found[0] if found else f"no answer in {HUB_TIMEOUT_SECONDS:g} seconds"
    if reason is None:
        return None
    go_offline()
    return f"{constants.ENDPOINT} cannot be reached ({reason})"


@functools.cache
def _say_once(text: str) -> None:
    print(f"peftsweep: {text}", file=sys.stderr)


def _ask(endpoint: str) -> str | None:
    """Why ``endpoint`` does not answer; None where it does, whatever it says."""
    from huggingface_hub import get_session

    session: Any = get_session()  # which knows of proxies and certificates
    try:
        status = session.head(endpoint, timeout=HUB_TIMEOUT_SECONDS).status_code
    except Exception as error:  # of the HTTP library that this version of the client uses
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"status {status}" if status in GATEWAY_ERRORS else None


def go_offline() -> None:
    """Have this process, and all that it starts, load from the local cache alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_HUB_OFFLINE = True


def is_offline() -> bool:
    """Whether this process loads from the local cache alone."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def loading(what: str, instead: str) -> Iterator[None]:
    """Load ``what``, a key with a name on the hub, in the body; ``instead`` is what could be given in its place.

    Raises:
        InputError: it cannot be loaded.
    """
    offline, unreachable = is_offline(), problem()
    try:
        yield
        if unreachable and not offline:
            _say_once(f"{unreachable}: what is in the local cache is used")
    except InputError:
        raise
    except UNREADABLE as error:
        if unreachable is None:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{what}: cannot be loaded ({reason}); {instead} can be given instead") from error
        raise InputError(
            f"{what}: is not in the local cache, and {unreachable}; give {instead}, or download it where there is a "
            "network"
        ) from error
