"""From what a user calls a model to a folder or a GGUF file on this machine.

    None          the built-in model
    a folder      as it is, where it holds a config.json; the one GGUF model in it, where it holds
                  none, or no safetensors
    a GGUF file   as it is, whatever its name; of a model in several files any of them
    org/name      a Hugging Face id: from the cache, downloaded first where need be
    org/name:TAG  the same, of a repository with GGUF files that one: Q4_K_M

Only safetensors, JSON and templates of a repository's top folder are ever fetched. Every way in
which this fails is its own error with what to do about it. Knows files and networks; what the
files hold is `checkpoint.py`'s and `tokenizer_files.py`'s business. huggingface_hub is imported
when an id is asked for, not before.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadCheckpoint, DoesNotFit, InputError, ModelError, StorageError
from ..gguf.choice import choose_model, models_of
from ..gguf.file import is_gguf
from ..planning.budget import format_size

ALLOWED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]
# Any of these sets of files makes a tokenizer.
TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})
# Subfolders hold other formats (original/, onnx/); consolidated* are the same weights once more.
IGNORED = ["*/*", "consolidated*"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
NETWORK_MODULES = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
TIMEOUT_S = 20


@dataclass(frozen=True)
class DownloadSize:
    """What `resolve_model` is about to fetch, as text: "org/name: 3 files, 1.2 GiB"."""

    model: str
    num_files: int
    missing_bytes: int  # of total_bytes; the rest is in the cache
    total_bytes: int

    def __str__(self) -> str:
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        return f"{self.model}: {files}, {format_size(self.missing_bytes)}"


def builtin_folder() -> Path:
    """The folder of the small model that comes with Ebbtide."""
    from .. import builtin

    folder = builtin.model_folder()
    if not (folder / "config.json").is_file():
        raise ModelError(
            "this installation lacks the built-in model; name a model, or install Ebbtide again"
        )
    return folder


def log_download(size: DownloadSize) -> None:
    """Said before a download begins. A program shows it by handling the logger "ebbtide"."""
    logging.getLogger("ebbtide").info("Downloading %s.", size)


def resolve_model(
    model: str | os.PathLike[str] | None,
    revision: str | None = None,
    on_size: Callable[[DownloadSize], None] | None = None,
) -> Path:
    """The folder of `model`, or its GGUF file. `on_size` is called before a download begins, and
    only then.

    ModelError for what is not there or cannot be had, BadCheckpoint for a repository that holds no
    weights we read, DoesNotFit (tier "disk") where the download would fill the disk.
    """
    found = local_model(model, revision)
    if found is not None:
        return found
    assert model is not None  # which names the built-in one
    name, _, tag = os.fspath(model).partition(":")
    return _from_hub(name, revision, on_size, tag or None)


def local_model(model: str | os.PathLike[str] | None, revision: str | None = None) -> Path | None:
    """The same for what lies here; None for an id, of which the hub or its cache knows more. Asks
    no network. Raises ModelError, BadCheckpoint, InputError."""
    if model is None:
        _refuse_revision(revision, "the built-in model")
        return builtin_folder()
    text = os.fspath(model)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{model!r} is not the name of a model")
    folder = Path(text).expanduser()
    found = folder.glob("*.gguf") if folder.is_dir() else ()
    models = models_of(path.name for path in found if is_gguf(path))
    has_other = not models or any(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file() and has_other:
        _refuse_revision(revision, f"the folder {folder}")
        return folder
    if folder.is_file():
        if not is_gguf(folder):
            raise ModelError(
                f"{folder} is a file, and no GGUF model: give the folder that a model's files lie "
                "in, or a GGUF file"
            )
        _refuse_revision(revision, f"the file {folder}")
        return folder
    name = text.partition(":")[0]
    is_id = MODEL_ID.fullmatch(name) is not None and ".." not in name and "--" not in name
    if folder.is_dir():
        if len(models) == 1:
            _refuse_revision(revision, f"the folder {folder}")
            return folder / models[0][0]
        if models:
            raise ModelError(
                f"{folder} holds {len(models)} GGUF models; name one: "
                f"{', '.join(files[0] for files in models[:8])}{', ...' * (len(models) > 8)}"
            )
        if not is_id:
            raise BadCheckpoint(
                f"{folder} has no config.json and no GGUF file that is whole: it is not the "
                "folder of a model"
            )
    if isinstance(model, os.PathLike) or _looks_local(text):
        raise ModelError(f"there is no folder or file {folder}")
    if not is_id:
        raise ModelError(
            f"{text!r} is neither a folder nor a GGUF file here, nor a Hugging Face id of the form "
            "org/name"
        )
    return None


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise InputError(f"{what} has no revisions; leave {revision!r} out")


def _looks_local(text: str) -> bool:
    if text.startswith((".", "/", "~", os.sep)) or text.count(os.sep) > 1 or text.count("/") > 1:
        return True
    if text.partition(":")[0].lower().endswith((".gguf", ".safetensors")):  # no repository's name
        return True
    return os.name == "nt" and ("\\" in text or ":" in text)


def _from_hub(
    model: str,
    revision: str | None,
    on_size: Callable[[DownloadSize], None] | None,
    tag: str | None,
) -> Path:
    import huggingface_hub as hub

    try:
        info = hub.HfApi().model_info(
            model, revision=revision, files_metadata=True, timeout=TIMEOUT_S
        )
    except Exception as error:
        if _is_offline(error):
            return _from_cache(model, revision, tag, error)
        raise _explained(error, model, revision) from error
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    gguf = _wanted_gguf(model, files, tag)
    sizes = {name: files[name] for name in gguf} if gguf else _wanted_sizes(model, files)
    missing = {
        name: size
        for name, size in sizes.items()
        if not isinstance(hub.try_to_load_from_cache(model, name, revision=info.sha), str)
    }
    if missing:
        download = DownloadSize(model, len(missing), sum(missing.values()), sum(sizes.values()))
        _check_disk(download, Path(hub.constants.HF_HUB_CACHE))
        if on_size is not None:
            on_size(download)
    allowed, ignored = _patterns(gguf)
    try:
        folder = Path(
            hub.snapshot_download(
                model, revision=revision, allow_patterns=allowed, ignore_patterns=ignored
            )
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"the disk is full: {model} was downloaded in part") from error
        if _is_offline(error):
            raise ModelError(
                f"the download of {model} broke off: {_reason(error)}. Start again, and it goes on "
                "where it stopped"
            ) from error
        raise _explained(error, model, revision) from error
    return folder / gguf[0] if gguf else folder


def _patterns(gguf: list[str]) -> tuple[list[str], list[str]]:
    """What is fetched and what of it is not, as snapshot_download takes them: these GGUF files, or
    what else we read."""
    return ([glob.escape(name) for name in gguf], []) if gguf else (ALLOWED, IGNORED)


def _wanted_gguf(model: str, files: Iterable[str], tag: str | None) -> list[str]:
    """The GGUF files to take; none where a repository has safetensors, and no tag is given."""
    models = models_of(files)
    has_weights = any(name.endswith(".safetensors") and "/" not in name for name in files)
    if not models and tag is not None:
        raise ModelError(f"{model} has no GGUF files, so that {tag!r} names none; leave it out")
    return choose_model(models, tag, model) if models and (tag or not has_weights) else []


def _from_cache(model: str, revision: str | None, tag: str | None, failed: Exception) -> Path:
    """The snapshot of an earlier download, when the hub cannot be asked."""
    import huggingface_hub as hub

    offline = _name(failed) == "OfflineModeIsEnabled"
    why = (
        "HF_HUB_OFFLINE is set; unset it to download"
        if offline
        else f"the hub cannot be reached ({_reason(failed)}); check the connection"
    )
    at = f" at revision {revision}" if revision else ""
    some, cause = "only in part", None
    allowed, ignored = _patterns([])
    try:
        folder = Path(
            hub.snapshot_download(
                model,
                revision=revision,
                local_files_only=True,
                allow_patterns=allowed,
                ignore_patterns=ignored,
            )
        )
        is_whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
        if is_whole and tag is None:
            return folder
    except FileNotFoundError as error:  # what huggingface_hub's own errors derive from
        cause, found = error, getattr(error, "snapshot_path", None)
        if found is None:
            some, folder = "not", None
        else:  # perhaps the GGUF file that is meant is all that was ever fetched
            folder = Path(found)
    models = [] if folder is None else _cached_gguf(folder)
    if folder is None or not models:
        raise ModelError(f"{model}{at} is {some} on this machine, and {why}") from cause
    return folder / choose_model(models, tag, model)[0]


def _cached_gguf(folder: Path) -> list[list[str]]:
    return models_of(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))


def _wanted_sizes(model: str, files: dict[str, int]) -> dict[str, int]:
    """{file: bytes} of what will be fetched. BadCheckpoint where that would be no model for us."""
    from huggingface_hub.utils import filter_repo_objects

    names = filter_repo_objects(files, allow_patterns=ALLOWED, ignore_patterns=IGNORED)
    wanted = {name: files[name] for name in names}
    if not any(name.endswith(".safetensors") for name in wanted):
        pickles = sorted(name for name in files if name.endswith(PICKLES))
        if pickles:
            raise BadCheckpoint(
                f"{model} has no safetensors, only pickled weights ({pickles[0]}). Loading a pickle"
                " runs whatever program is in it, so Ebbtide never does: look for a repository with"
                " *.safetensors, or convert it with transformers (save_pretrained)"
            )
        raise BadCheckpoint(f"{model} has no safetensors in its top folder, and no GGUF files")
    if "config.json" not in wanted:
        raise BadCheckpoint(f"{model} has no config.json, so nothing was downloaded")
    if not any(files <= wanted.keys() for files in TOKENIZERS):
        raise BadCheckpoint(
            f"{model} has no tokenizer.json (nor vocab.json with merges.txt, nor tokenizer.model), "
            "so nothing was downloaded"
        )
    return wanted


def _check_disk(download: DownloadSize, cache: Path) -> None:
    folder = cache
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if download.missing_bytes > free_bytes:
        raise DoesNotFit(
            f"downloading {download.model} needs {format_size(download.missing_bytes)} in {cache}, "
            f"where {format_size(free_bytes)} are free: make room, or set HF_HOME to another disk",
            tier="disk",
            needed_bytes=download.missing_bytes,
            available_bytes=free_bytes,
        )


def _is_offline(error: Exception) -> bool:
    """Whether the hub could not be reached or is out of order, whichever library says so. Its other
    answers are not that."""
    if (response := getattr(error, "response", None)) is not None:
        return response.status_code >= 500
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return not modules.isdisjoint(NETWORK_MODULES) or _name(error) == "LocalEntryNotFoundError"


def _explained(error: Exception, model: str, revision: str | None) -> ModelError:
    """The hub's answer, and what to do about it."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{model}"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"{model} is gated: accept its terms at {page}, then log in with `hf auth login` (or "
            "set HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"there is no model {model} on Hugging Face, nor a folder of that name here. Check the "
            "spelling; if it is private, log in with `hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{model} has no revision {revision!r}: {page}/tree/main lists them")
    return ModelError(f"{model} could not be fetched: {_reason(error)}")


def _name(error: Exception) -> str:
    return type(error).__name__


def _reason(error: Exception) -> str:
    """The first line: the hub's messages go on for many."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else _name(error)
