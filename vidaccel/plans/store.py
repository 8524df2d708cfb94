"""The text of policy files, and where it is kept: files, folders, this package and the hub.

A file is untrusted input: its size is bounded, and what is no JSON object is refused in one line.
What its fields say is checked in `vidaccel.plans.policy`.
"""

import json
import logging
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from vidaccel.errors import PolicyError
from vidaccel.files import write_text

MAX_BYTES = 32 * 2**20
FILE_NAME = "vidaccel_policy.json"


def shipped_policies() -> dict[str, Path]:
    """Return the files that come with vidaccel: <org>--<model>/<name>.json -> path, sorted."""
    return {
        f"{folder.name}/{file.name}": Path(str(file))
        for folder in sorted(files("vidaccel.policies").iterdir(), key=lambda entry: entry.name)
        if folder.is_dir()
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if file.name.endswith(".json")
    }


def shipped_as(name: str) -> dict[str, Path]:
    """Return the files that come with vidaccel under a name.

    Args:
        name: the hub id of a model for all of its files, such as vidaccel/tiny-wan, or that of one
            file as reports have it, such as vidaccel--tiny-wan/50-steps.json; .json may be left
            out, and the model may be written as a hub id there too.

    Returns:
        As `shipped_policies`; empty where there is none.
    """
    shipped, wanted = shipped_policies(), name.removesuffix(".json")
    return {
        file: path
        for file, path in shipped.items()
        for model, _, stem in [file.removesuffix(".json").partition("/")]
        if wanted in (model, f"{model}/{stem}")
        or wanted in (hub_id := model.replace("--", "/", 1), f"{hub_id}/{stem}")
    }


def find(source: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """Find the policy file that a file, a folder, a shipped policy or a hub id names.

    A shipped one is found before a hub is asked, from which it would be downloaded.

    Args:
        source: where the policy is.
        revision: branch, tag or commit of a hub repository.
        token: for the hub; None uses the one that is logged in.

    Raises:
        PolicyError: the hub has no such repository or file, or several shipped ones have that name.
    """
    path = Path(source)
    if path.is_dir():
        return path / FILE_NAME
    if revision is None and not path.exists() and (shipped := shipped_as(str(source))):
        if len(shipped) > 1:
            raise PolicyError(f"{source} is the name of several policies: {', '.join(shipped)}")
        return next(iter(shipped.values()))
    if not path.exists() and path.suffix != ".json":
        return _from_hub(str(source), revision, token)
    return path


def read(file: Path) -> bytes:
    """Read a policy file; raises PolicyError when it is missing or too large."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"cannot read policy {file}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise PolicyError(f"policy {file} is larger than {MAX_BYTES // 2**20} MiB")
    return raw


def write(file: Path, text: str) -> None:
    """Write a policy file, whole or not at all; raises PolicyError when it cannot be."""
    try:
        write_text(file, text)
    except OSError as error:
        raise PolicyError(f"cannot write policy {file}: {error.strerror}") from error


def upload(
    text: str, repo_id: str, *, message: str, private: bool | None, token: str | bool | None
) -> str:
    """Upload a policy file to a model repository on the hub, which is made if need be.

    Returns:
        The address of the commit.

    Raises:
        PolicyError: the hub refused it or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_file(
            path_or_fileobj=text.encode(),
            path_in_repo=FILE_NAME,
            repo_id=name,
            commit_message=message,
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = shortened(str(error).strip().partition("\n")[0])
        raise PolicyError(f"cannot upload the policy to {repo_id}: {reason}") from error
    return str(commit.commit_url)


def parse(raw: bytes | str) -> tuple[str, dict[str, Any]]:
    """Return the text of a policy file and the JSON object in it.

    Raises:
        PolicyError: it is no such object, or one that says a thing twice or not in finite numbers.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise PolicyError("not a policy file: nested too deeply") from error
    except ValueError as error:  # of the encoding, too
        found = f"invalid JSON: {error}" if raw.strip() else "found nothing in it"
        raise PolicyError(f"not a policy file: {found}") from error
    if not isinstance(data, dict):
        raise PolicyError(f"not a policy file: found {type(data).__name__}, expected an object")
    return text, data


def version_of(text: Any, major: int) -> tuple[int, int]:
    """Return the schema version of a file; raises PolicyError where it is not `major`.x."""
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text) if isinstance(text, str) else None
    if match is None or int(match[1]) != major:
        raise PolicyError(
            f"schema_version: found {shortened(repr(text))}, expected '{major}.x'; "
            "a newer file needs a newer vidaccel"
        )
    return int(match[1]), int(match[2])


def to_text(data: dict[str, Any]) -> str:
    """Return the text of a file: sorted keys, one line per list of numbers and per edge."""
    text = json.dumps(data, indent=1, sort_keys=True)
    # A list or object without another one inside goes on one line.
    return re.sub(r"[\[{][^\[\]{}\"]*[\]}]|\{[^\[\]{}]*\}", _on_one_line, text) + "\n"


def shortened(text: str) -> str:
    """Return text from a file, short and on one line."""
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _from_hub(repo: str, revision: str | None, token: str | bool | None) -> Path:
    import huggingface_hub as hub

    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # of each of its attempts
    try:
        if not isinstance(hub.try_to_load_from_cache(repo, FILE_NAME, revision=revision), str):
            # Asked once: a download that finds no hub tries again for half a minute.
            hub.get_hf_file_metadata(
                hub.hf_hub_url(repo, FILE_NAME, revision=revision), token=token
            )
        return Path(hub.hf_hub_download(repo, FILE_NAME, revision=revision, token=token))
    # What a lost connection raises is of an HTTP library that differs from version to version.
    except Exception as error:
        reason = shortened(str(error).strip().partition("\n")[0])
        raise PolicyError(
            f"no policy file or folder {repo}, and not on the hub: {reason}"
        ) from error
    finally:
        logging.disable(before)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shortened(twice)}: found twice, expected once")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"found {name}, expected a finite number")


def _on_one_line(match: re.Match[str]) -> str:
    return re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]")
