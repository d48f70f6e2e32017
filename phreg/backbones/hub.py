"""The one place that fetches from the Hugging Face hub, and puts what can go wrong there into words.

The client of `huggingface_hub` does the work, so HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what
they mean everywhere; it resumes a cut download a few times, and leaves the cache ready for the next try.
Nothing here knows what is in a file.

    repository, revision ──► snapshot(names) ──► folder of the cache, named after the commit
"""

import errno
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, whichever the client is built on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phreg.errors import LoadError


def snapshot(repository: str, revision: str | None, names: Iterable[str]) -> Path:
    """Fetches some files of a repository.

    Args:
        repository: Hub id, `owner/name`.
        revision: Commit, branch or tag; None means the main branch.
        names: Names or glob patterns of files; those that the repository lacks are left out.

    Returns:
        The repository's folder in the cache, whose name is the resolved commit. It may hold other files too.

    Raises:
        LoadError: Repository, revision, network or permission is missing, or the download broke off.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except (OSError, HTTPError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        asked = f"model '{repository}'{at} asked of {constants.ENDPOINT}"
        raise LoadError(f"{asked}: {_explain(error, repository)}") from error


def _explain(error: Exception, repository: str) -> str:
    """Says what was found and what to do."""
    match error:
        case GatedRepoError():
            return (
                "it is gated, and this account has no access; ask for it at "
                f"{constants.ENDPOINT}/{repository}, then log in with `hf auth login` or set HF_TOKEN"
            )
        case RevisionNotFoundError():
            return "it has no such revision; give a commit, branch or tag of it, or leave the revision out"
        case RepositoryNotFoundError():
            return (
                "no such repository is there, or it is private, and no local folder has that name; check the "
                "spelling, or log in with `hf auth login` or set HF_TOKEN"
            )
        case HFValidationError():
            return (
                "this is not how a repository is named, and no local folder has that name; give owner/name, "
                "or the path of a folder"
            )
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return (
                f"access was refused (HTTP {error.response.status_code}), as with a wrong or expired token; "
                "log in with `hf auth login`, or correct HF_TOKEN"
            )
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                "HF_HUB_OFFLINE is set, and its files are not all in the cache "
                f"{constants.HF_HUB_CACHE}; unset it once, or fill the cache with `hf download {repository}`"
            )
        case LocalEntryNotFoundError():
            return (
                f"no usable answer ({_brief(error.__cause__ or error)}), and its files are not all in the "
                "cache; check the network and HF_ENDPOINT, then run the same again"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EACCES | errno.EROFS):
            return (
                f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); make room, or set "
                "HF_HOME to another folder"
            )
        case _:
            return f"the download broke off ({_brief(error)}); check the network, then run the same again"


def _brief(error: BaseException) -> str:
    """Shortens another library's error to its type and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
