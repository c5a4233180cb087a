"""Upload folders to the Hugging Face hub, with a model card. Imports no torch."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dinalrm_align.train.files import HUB_ID

SD3 = "stabilityai/stable-diffusion-3"


def check_repository(repo_id: str) -> None:
    """Raise ValueError unless `repo_id` is OWNER/NAME."""
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"push_to_hub: got {repo_id!r}; expected OWNER/NAME, a repository on the Hugging Face hub")


def check_login(repo_id: str) -> None:
    """Raise ValueError unless `repo_id` is OWNER/NAME, and OSError unless the hub accepts the login of this machine."""
    from huggingface_hub import HfApi

    check_repository(repo_id)
    try:
        HfApi().whoami()
    except OSError as error:
        why, how = str(error).strip().partition("\n")[0], "run `hf auth login`, or leave the option out"
        raise OSError(f"push_to_hub: the hub cannot be used ({why:.100}): {how}") from error


def upload(
    repo_id: str,
    write: Callable[[Path, str], None],
    *,
    private: bool | None = None,
    token: str | None = None,
    **options: Any,
) -> str:
    """Upload files to a repository, which is created if needed. Return the address of the commit.

    write(folder, repo_id) writes the files; `repo_id` then has an owner. options: arguments of `HfApi.upload_folder`,
    such as commit_message. Raises the errors of huggingface_hub.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), repo_id)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def card(facts: Mapping[str, Any], base: str, *sections: str) -> str:
    """Return a model card: YAML with the facts, the base model and its licence; then the sections, and the licence.

    base: hub id of the base model. The path of a folder is left out, because the hub takes ids only.
    """
    on_hub, terms = HUB_ID.fullmatch(base) is not None, {}
    if base.startswith(SD3):
        link = f"https://huggingface.co/{base}/blob/main/LICENSE.md"
        terms = {"license": "other", "license_name": "stabilityai-ai-community", "license_link": link}
    head = {**facts, **({"base_model": base} if on_hub else {}), **terms}
    licence = "## Licence\n\nDerived from its base model, whose licence applies"
    licence += f": [{terms['license_name']}]({terms['license_link']})." if terms else "."
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join([*sections, licence]) + "\n"
