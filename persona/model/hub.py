"""Models of the hub: from the cache, from the hub or its mirror, or a message with the ways out."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from persona.errors import EnvironmentFault, UsageError
from persona.model.folders import check_model_folder, missing_parts

# Mistral puts a second copy of all weights beside its shards, Llama one in original/
HUB_IGNORED = ["consolidated*", "original/*"]
HUB_SMALL = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]  # config and tokenizer
HUB_FILES = [*HUB_SMALL, "*.safetensors"]
HUB_TIMEOUT_SECONDS = 10.0


def hub_model(repo_id: str, fallback: str, weights: bool) -> Path:
    """The local snapshot of `repo_id`, cached or downloaded, without `weights` its small files; then the hub is off.

    Raises `EnvironmentFault` with the ways out, one of which is the model `fallback`.
    """
    folder = _snapshot(repo_id, fallback, weights)
    constants.HF_HUB_OFFLINE = True  # all that is needed is here now
    return check_model_folder(folder, weights)


def _snapshot(repo_id: str, fallback: str, weights: bool) -> Path:
    cached: Path | None = None
    try:
        cached = Path(snapshot_download(repo_id, local_files_only=True))
        if not missing_parts(cached, weights):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(repo_id, timeout=HUB_TIMEOUT_SECONDS)
        files = HUB_FILES if weights else HUB_SMALL
        folder = snapshot_download(repo_id, allow_patterns=files, ignore_patterns=HUB_IGNORED)
        return check_model_folder(Path(folder), weights)
    except GatedRepoError:
        raise EnvironmentFault(
            f"{repo_id} is gated: accept its licence at {constants.ENDPOINT}/{repo_id}, then run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(f"{repo_id} does not exist on {constants.ENDPOINT}, or needs `hf auth login`.") from None
    except Exception as error:
        # the hub client lets its HTTP library's own exceptions through; which library that is has changed before
        libraries = ("httpx", "httpcore", "requests", "urllib3", "anyio")
        known = isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | OSError)
        if not known and not type(error).__module__.startswith(libraries):
            raise
        raise _hub_fault(repo_id, fallback, cached, error) from None


def _hub_fault(repo_id: str, fallback: str, cached: Path | None, error: Exception) -> EnvironmentFault:
    if cached is None:
        state = "nothing of it is in the cache"
    else:
        state = f"the cache holds a part of it in {cached}; missing: {', '.join(missing_parts(cached))}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    mirror = "https://hf-mirror.com"
    powershell = f'$env:HF_ENDPOINT = "{mirror}"   (PowerShell; in cmd: set HF_ENDPOINT={mirror})'
    set_mirror = powershell if sys.platform == "win32" else f"export HF_ENDPOINT={mirror}"
    return EnvironmentFault(
        f"The model {repo_id} could not be fetched.\n  tried: {constants.ENDPOINT}/{repo_id}\n  answer: {reason}\n"
        f"  cache: {state}\nWays out:\n"
        f"  - a mirror: {set_mirror}   and run the command again (a broken download continues)\n"
        f"  - download it elsewhere, copy the folder here: --set model.name_or_path=FOLDER\n"
        f"  - the embedded model, which needs no hub: --set model.name_or_path={fallback}"
    )
