"""Uploading an export's folder to the hub of Hugging Face, by its own library.

Files that have arrived are known by their content: after an interruption the same command sends the rest.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from train.errors import UserError


def repository(push: str) -> str:
    """``<organisation>/<name>`` of ``hub:<organisation>/<name>``.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)", push)
    if not found:
        raise UserError(f"push is {push!r}, expected hub:<organisation>/<name>")
    return found[1]


def upload(folder: Path, name: str) -> str:
    """Uploads a folder to a repository, made where there is none, and returns a line.

    Args:
        name: ``<organisation>/<name>``.

    Raises:
        UserError: the hub is not reached, or refuses; the folder stays.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(name, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="LoRA and model card", ignore_patterns=[".export"]
        )
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"push to {name} failed ({type(error).__name__}: {why}): {folder} is whole; check the network and the "
            "login (hf auth login), and give the same command again"
        ) from error
    return f"pushed to {name}: {done.commit_url}"
