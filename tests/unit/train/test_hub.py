"""Uploads to the hub, with a double of its client; model cards as the hub reads them.

The double's arguments are those of `HfApi` of huggingface_hub 2.4 (hf_api.py: whoami, create_repo, upload_folder).
"""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from dinalrm_align.train.hub import card, check_login, upload


class Hub:
    def __init__(self, token=None):
        self.token = token

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo_id, *, private, exist_ok):
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message=None):
        names = sorted(path.name for path in Path(folder_path).iterdir())
        return f"{repo_id} {names} {self.token} {commit_message}"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)


def test_upload_writes_the_files_for_the_full_name_of_the_repository(hub):
    def write(folder, repo_id):
        (folder / repo_id.replace("/", "-")).touch()

    assert upload("name", write, token="secret", commit_message="m") == "me/name ['me-name'] secret m"


def test_a_login_is_checked_before_training(hub, monkeypatch):
    check_login("me/name")

    def refuse(self):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nand more")

    monkeypatch.setattr(Hub, "whoami", refuse)
    with pytest.raises(OSError, match=r"\(Token is required\): run `hf auth login`"):
        check_login("me/name")


@pytest.mark.parametrize("name", ["name", "me/a/b", "", "/tmp/x", "me/"])
def test_a_repository_is_owner_and_name(hub, name):
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        check_login(name)


def test_a_card_has_the_base_model_and_its_licence():
    medium = "stabilityai/stable-diffusion-3.5-medium"
    data = ModelCard(card({"tags": ["lora"]}, medium, "# Title")).data
    assert (data.tags, data.base_model, data.license) == (["lora"], medium, "other")
    assert data.license_name == "stabilityai-ai-community" and medium in data.license_link


@pytest.mark.parametrize("base", ["/home/me/sd3", "../pipeline"])
def test_a_card_names_no_local_base_model(base):
    text = card({"tags": ["lora"]}, base, "# Title", "## More")
    assert ModelCard(text).data.to_dict() == {"tags": ["lora"]}
    assert text.index("# Title") < text.index("## More") < text.index("## Licence")
