"""Every file that is written has the permissions that the process's umask asks for."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinalrm_align import LatentReward
from dinalrm_align.align.policy import Policy
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.stack import StackConfig, build_pipeline
from dinalrm_align.train.files import atomic_folder, atomically, write_atomically


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.rglob("*") if path.is_file()}


def private(path: Path) -> None:
    """A file as some libraries write it: for its owner alone, moved into place."""
    other = path.with_name("library")
    save_file({"a": torch.ones(2)}, other)
    other.chmod(0o600)
    other.rename(path)


def test_atomic_writes_follow_the_umask_whoever_writes(tmp_path, umask):
    with atomically(tmp_path / "one" / "a.safetensors") as temporary:
        private(temporary)
    with atomic_folder(tmp_path / "two") as folder:
        private(folder / "b.safetensors")
        (folder / "inside").mkdir()
        private(folder / "inside" / "c.safetensors")
    write_atomically(tmp_path / "d.json", "{}")
    (tmp_path / "d.json").chmod(0o600)
    write_atomically(tmp_path / "d.json", "[]")
    (tmp_path / ".tmp_e.json").write_text("of a killed process")
    (tmp_path / ".tmp_e.json").chmod(0o600)
    write_atomically(tmp_path / "e.json", "{}")
    found = modes(tmp_path)
    assert found == dict.fromkeys(
        ["a.safetensors", "b.safetensors", "c.safetensors", "d.json", "e.json"], oct(0o666 & ~umask)
    )


def test_exported_loras_and_rewards_follow_the_umask(tmp_path, umask, tiny_reward_dir, tiny_world):
    Policy(build_pipeline(StackConfig.tiny(), seed=0).transformer, LoraConfig(2, 2), seed=0).save_lora(
        tmp_path / "lora"
    )
    reward = LatentReward.from_pretrained(tiny_reward_dir)
    for format in ("dinalrm", "released"):
        reward.save_pretrained(tmp_path / format, format=format)
    found = modes(tmp_path)
    assert {"pytorch_lora_weights.safetensors", "model.safetensors", "adapter_model.safetensors"} <= found.keys()
    assert set(found.values()) == {oct(0o666 & ~umask)}, found


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomically(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}
