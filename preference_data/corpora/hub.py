"""Fetch a folder of a data set from the Hugging Face Hub, each file checked by the sha256 that the Hub lists.

`huggingface_hub` fetches several files at once, continues those that broke off and leaves a server alone that
asks for it. It neither looks at checksums nor refuses paths that leave the folder; both are done here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from preference_data.audio.clip_files import BadAudio, resolve_inside
from preference_data.corpora.fetch import DownloadFailed, OnBytes, other_checksum

_ATTEMPTS = 6
_AT_ONCE = 8


def fetch_folder(
    repo: str,
    name: str,
    folder: Path,
    on_bytes: OnBytes | None = None,
    *,
    endpoint: str | None = None,
    wait_s: float = 1.0,
) -> None:
    """Fetch all files of a folder of a data set, but for those that are there and whole.

    Args:
        repo: of the data set on the Hub.
        name: of the folder in it.
        folder: where to; files keep their paths.
        on_bytes: reports progress, all files together.
        endpoint: the Hub; by default what `HF_ENDPOINT` says.
        wait_s: before a second attempt; doubled with every further one.

    Raises:
        DownloadFailed: the Hub refuses or keeps failing, lists a path that leaves the folder, or a file has
            another checksum than it says.
    """
    try:
        api = HfApi(endpoint)
        commit = api.dataset_info(repo).sha
        entries = api.list_repo_tree(repo, name, repo_type="dataset", revision=commit, recursive=True)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        for file in files:
            resolve_inside(folder, file.path)
    except (HfHubHTTPError, httpx2.HTTPError) as error:
        raise DownloadFailed(f"the Hub does not list {repo}: {error}") from error
    except BadAudio as error:
        raise DownloadFailed(f"the Hub lists a path that is refused: {error}") from error
    for attempt in range(_ATTEMPTS):
        try:
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=commit,
                local_dir=folder,
                allow_patterns=f"{name}/*",
                max_workers=_AT_ONCE,
                endpoint=endpoint,
                tqdm_class=_progress(name, sum(file.size for file in files), on_bytes),
            )
            break
        except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
            if attempt == _ATTEMPTS - 1 or not _is_passing(error):
                raise DownloadFailed(
                    f"{repo}: {error}. What came is kept: run the same command again to go on"
                ) from error
            time.sleep(wait_s * 2**attempt)
    for file in files:
        path = folder / file.path
        if file.lfs and (problem := other_checksum(f"sha256:{file.lfs.sha256}", path)):
            path.unlink()
            raise DownloadFailed(
                f"{repo}: {file.path}: {problem}; it was damaged or replaced. Run the same command again; if "
                "that does not help, look at its page"
            )


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in (408, 429) or response.status_code >= 500


def _progress(name: str, total: int, on_bytes: OnBytes | None) -> type[Any]:
    """A class of progress bars that draw nothing; the bar of bytes on disk reports to `on_bytes`."""

    class Reporting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = str(options.get("desc", "")).startswith("Reconstructing")
            self._bytes = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts_bytes and on_bytes:
                self._bytes += int(n or 0)
                on_bytes(name, self._bytes, total)

    return Reporting
