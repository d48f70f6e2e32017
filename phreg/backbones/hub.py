"""The one place that talks to the Hugging Face hub, and puts what can go wrong there into words.

The client of `huggingface_hub` does the work, so HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what
they mean everywhere; it resumes a cut download a few times, and leaves the cache ready for the next try.
Nothing here knows what is in a file.

    repository, revision ──► snapshot(names) ──► folder of the cache, named after the commit
    folder ──► upload ──► one commit of a repository

A token is only ever seen by the client; no message here is made of a request's headers.
"""

import errno
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, whichever the client is built on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phreg.errors import LoadError, PushError


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


def find_file(repository: str, revision: str | None, name: str) -> Path | None:
    """Finds one file of a repository, in the cache or else on the hub.

    Returns:
        The file in the cache; None where the repository has none such, or cannot be asked.
    """
    try:
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if cached is not None:  # a path, or the mark of a file that is known not to be there
            return Path(cached) if isinstance(cached, str) else None
        return Path(hf_hub_download(repository, name, revision=revision))
    except (OSError, HTTPError, HFValidationError):
        return None


def is_cached(repository: str, revision: str, name: str) -> bool:
    """Tells whether a file of a commit is on this disk already."""
    return isinstance(try_to_load_from_cache(repository, name, revision=revision), str)


def upload(
    folder: Path,
    repository: str,
    *,
    message: str,
    private: bool = False,
    branch: str | None = None,
    replace: Iterable[str] = (),
    ours: Iterable[str] = (),
) -> str:
    """Puts a folder into a model repository, which is created where there is none, as one commit.

    Args:
        folder: The folder.
        repository: Hub id, `owner/name`.
        message: Summary of the commit.
        private: Whether nobody else may see it.
        branch: Branch to commit to, created where there is none; None means the main branch.
        replace: Patterns of files that go when the folder does not hold them.
        ours: Names of files by which a repository with weights is known as one that may be replaced.

    Returns:
        The address of the commit.

    Raises:
        PushError: Token, permission or network is missing, or the repository holds somebody else's model.
            Then there is no commit.
    """
    asked = f"asked to push to '{repository}' of {constants.ENDPOINT}"
    if get_token() is None:
        raise PushError(
            f"{asked}, and there is no token; log in with `hf auth login`, or set HF_TOKEN to one that "
            "may write"
        )
    api = HfApi()
    try:
        _prepare_repository(api, repository, asked, private=private, branch=branch, ours=ours)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message=message,
            delete_patterns=list(replace),
        )
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise PushError(f"{asked}: {_explain_upload(error)}; nothing was committed") from error
    return str(commit.commit_url)


def _prepare_repository(
    api: HfApi, repository: str, asked: str, *, private: bool, branch: str | None, ours: Iterable[str]
) -> None:
    """Makes a repository and a branch where there is none, and refuses one that may not be written to.

    Raises:
        PushError: It is public and should not be, or holds somebody else's model.
    """
    api.create_repo(repository, private=private or None, exist_ok=True)
    if private and not api.repo_info(repository).private:
        raise PushError(
            f"{asked} in private, and it exists and is public; make it private at "
            f"{constants.ENDPOINT}/{repository}/settings, or push to another"
        )
    if branch is not None:
        api.create_branch(repository, branch=branch, exist_ok=True)
    there = set(api.list_repo_files(repository, revision=branch))
    weights = sorted(name for name in there if name.endswith((".safetensors", ".bin", ".pt", ".h5")))
    if weights and there.isdisjoint(ours):
        raise PushError(
            f"{asked}, which holds a model that phreg did not write ({weights[0]}); push to another "
            "repository, or empty that one first"
        )


def _explain_upload(error: Exception) -> str:
    """Says what was found and what to do."""
    cause = (
        error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
    )  # of an upload thread
    match cause:
        case HFValidationError():
            return "this is not how a repository is named; give owner/name"
        case HfHubHTTPError() if cause.response.status_code == 401:
            return (
                "the token was refused (HTTP 401), as when it is wrong or expired; log in with "
                "`hf auth login`, or correct HF_TOKEN"
            )
        case HfHubHTTPError() if cause.response.status_code in (403, 404):
            return (
                f"this account or token may not write there (HTTP {cause.response.status_code}); push to a "
                "repository of your own, or log in with a token that may write"
            )
        case HfHubHTTPError() if cause.response.status_code == 409:
            return "somebody else changed it at the same time (HTTP 409); run the same again"
        case HfHubHTTPError():
            return f"the hub refused (HTTP {cause.response.status_code}: {_brief(cause)}); try again later"
        case OSError() if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set; unset it, or write the folder alone with --dry-run"
        case _:
            return f"the upload broke off ({_brief(cause)}); check the network, then run the same again"


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
