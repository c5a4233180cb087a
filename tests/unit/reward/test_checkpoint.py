"""Reading and writing checkpoints: strict both ways, atomic, in our layout and in the released one."""

import json
import os
import re
import shutil
from itertools import product

import pytest
import torch
from bomb import Bomb
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_reward import make_inputs, raw_scores, shake, tiny_reward_config

from dinalrm_align import LatentReward, RewardConfig
from dinalrm_align.models.weights import fetch, load_tensors
from dinalrm_align.reward.checkpoint import read_checkpoint, relocated, write_reward
from dinalrm_align.reward.config import HeadConfig, LoraConfig
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.train.digest import digest, fingerprint


@pytest.fixture
def folder(tiny_reward_dir, tmp_path):
    """A copy of the tiny reward beside nothing; tests may break it."""
    return shutil.copytree(tiny_reward_dir, tmp_path / "reward")


@pytest.fixture
def released(official, tmp_path):
    """A copy of the released-layout fixture; tests may break it."""
    return shutil.copytree(official, tmp_path / "released")


def rewrite(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def load(folder, tiny_pipeline):
    return LatentReward.from_pretrained(folder, transformer=tiny_pipeline.transformer)


def test_a_missing_tensor_is_named(folder, tiny_pipeline):
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("head.agg_text.bias"))
    with pytest.raises(ValueError, match=r"model.safetensors: .* 1 missing: head.agg_text.bias\."):
        load(folder, tiny_pipeline)


def test_an_unexpected_tensor_is_named(folder, tiny_pipeline):
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.update(surprise=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"model.safetensors: .* 1 unexpected: surprise\."):
        load(folder, tiny_pipeline)


def test_a_wrong_shape_is_named_with_both_shapes(folder, tiny_pipeline):
    change_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({"head.head.weight": torch.zeros(1, 3)})
    )
    with pytest.raises(ValueError, match=r"1 of another shape: head.head.weight \(1, 3\), expected \(1, 16\)"):
        load(folder, tiny_pipeline)


def test_only_the_first_three_of_many_names_are_listed(folder, tiny_pipeline):
    change_tensors(folder / "model.safetensors", lambda tensors: [tensors.pop(name) for name in list(tensors)[:9]])
    with pytest.raises(ValueError, match=r"9 missing: [^,]+, [^,]+, [^,]+, \.\.\."):
        load(folder, tiny_pipeline)


def test_a_base_model_of_another_width_is_refused(tiny_reward_dir, official):
    with pytest.raises(ValueError, match=r"do not fit the model: .*of another shape.*Check that"):
        LatentReward.from_pretrained(tiny_reward_dir, transformer=official / "transformer")


def test_nothing_is_copied_when_something_is_wrong():
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match="somewhere: .* 1 missing: b"):
        load_tensors(target, {"a": torch.ones(2)}, "somewhere")
    assert torch.equal(target["a"], torch.zeros(2))


def test_an_unknown_config_key_is_refused_with_the_nearest_name(folder):
    rewrite(folder / "config.json", score_bais=1.0)
    with pytest.raises(ValueError, match="unknown key 'score_bais'; did you mean 'score_bias'?"):
        read_checkpoint(folder)


def test_an_unknown_key_of_a_section_is_refused(folder):
    rewrite(folder / "config.json", lora={"rank": 4, "alpha": 8, "r": 4})
    with pytest.raises(ValueError, match="section 'lora': unknown key 'r'"):
        read_checkpoint(folder)


@pytest.mark.parametrize("section", [None, "lora", "head"])
def test_a_missing_config_key_is_named(folder, section):
    values = json.loads((folder / "config.json").read_text())
    within = values if section is None else values[section]
    gone = next(key for key in within if key not in ("lora", "head"))
    del within[gone]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{section or 'reward config'}.*: missing {gone}; every key must be"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["vae_shift_factor", "vae_scaling_factor", "score_scale", "score_bias"])
@pytest.mark.parametrize("value", [None, "1"])
def test_a_number_that_is_none_is_refused(folder, name, value):
    rewrite(folder / "config.json", **{name: value})
    with pytest.raises(ValueError, match=f"{name}: got .* {value!r}; expected a number"):
        read_checkpoint(folder)


def test_a_newer_format_is_refused(folder):
    rewrite(folder / "config.json", format_version=99)
    with pytest.raises(ValueError, match="format_version: got 99; expected 2.*update"):
        read_checkpoint(folder)


def test_version_1_is_read_as_what_it_meant(folder):
    """It had neither of the two keys of the head; a version 2 without them is refused, and so is any other gap."""
    values = json.loads((folder / "config.json").read_text())
    del values["head"]["film"], values["head"]["value_gates"]
    with pytest.raises(ValueError, match="section 'head': missing film, value_gates"):
        RewardConfig.from_dict(values)
    old = RewardConfig.from_dict({**values, "format_version": 1})
    assert old == read_checkpoint(folder).config
    assert (old.head.film, old.head.value_gates, old.format_version) == (True, True, 2)
    with pytest.raises(ValueError, match="section 'head': missing dropout"):
        del values["head"]["dropout"]
        RewardConfig.from_dict({**values, "format_version": 1})
    del values["head"]
    with pytest.raises(ValueError, match="missing head"):
        RewardConfig.from_dict({**values, "format_version": 1})


def test_a_config_that_is_no_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
        read_checkpoint(folder)


def test_broken_weights_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_cut_short_anywhere_is_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    for size in (*range(0, len(content) - 1, len(content) // 60), len(content) - 2):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_checkpoint(folder)


def test_a_flipped_bit_in_the_weights_is_refused_or_changes_no_tensor(folder):
    """What is not refused are bits of the header that name neither a tensor nor its place: 'format', padding."""
    path, before = folder / "model.safetensors", read_checkpoint(folder)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    positions = [*range(0, header, header // 150), *range(header, len(content), (len(content) - header) // 50)]
    for number, position in enumerate(positions):
        flipped = bytearray(content)
        flipped[position] ^= 1 << number % 8
        path.write_bytes(flipped)
        try:
            after = read_checkpoint(folder).tensors
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert position < header
            assert after.keys() == before.tensors.keys()
            assert all(torch.equal(after[name], before.tensors[name]) for name in after)
    assert refused > 0.9 * len(positions)


def test_weights_without_a_digest_are_read_and_with_a_wrong_one_refused(folder):
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["sha256"] == digest(read_checkpoint(folder).tensors)
    tensors = load_file(path)
    save_file(tensors, path, {"format": "pt"})
    read_checkpoint(folder)
    save_file(tensors, path, {"format": "pt", "sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"safetensors is damaged: its SHA-256 is not 0000.*write it again"):
        read_checkpoint(folder)


def test_the_digest_sees_names_types_shapes_and_bits():
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0, dtype=torch.bfloat16), "c": torch.zeros(0)}
    same = {name: tensors[name].clone() for name in reversed(tensors)}
    assert digest(tensors) == digest(same) == digest({**tensors, "a": torch.zeros(3, 2).T})
    for name, changed in [("a", torch.zeros(3, 2)), ("a", -torch.zeros(2, 3)), ("a", torch.zeros(2, 3).double()),
                          ("b", torch.tensor(1.01, dtype=torch.bfloat16)), ("c", torch.zeros(1))]:  # fmt: skip
        assert digest({**tensors, name: changed}) != digest(tensors)
    assert digest({"x" if name == "a" else name: tensors[name] for name in tensors}) != digest(tensors)


def test_fingerprints_tell_models_apart(tiny_pipeline):
    from dinalrm_align.shapes.stack import StackConfig, build_pipeline

    again, other = (build_pipeline(StackConfig.tiny(), seed=seed).transformer for seed in (0, 1))
    assert fingerprint(again) == fingerprint(tiny_pipeline.transformer) != fingerprint(other)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c"])
def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        fetch(source, ["a.json"])


def test_hub_ids_go_through_snapshot_download(monkeypatch, tmp_path):
    import huggingface_hub

    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: seen.update(k, id=a[0]) or str(tmp_path))
    hub = dict(revision="abc", token="hf_x", cache_dir="cache", local_files_only=True)
    assert fetch("owner/name", ["a.json"], subfolder="best", **hub) == tmp_path / "best"
    assert seen == hub | {"id": "owner/name", "allow_patterns": ["best/a.json"]}


def test_config_survives_json():
    config = tiny_reward_config(sigma=(0.2, 0.5), image_sigma=0.1, head=HeadConfig(width=32, use_logistic=True))
    assert RewardConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("change", "message"), [
    ({"visual_taps": (1, 5)}, r"visual_taps: got \(1, 5\).*num_layers = 3"),
    ({"visual_taps": ()}, r"visual_taps: got \(\); expected at least one"),
    ({"text_taps": (-1, 2)}, r"text_taps: got \(-1, 2\)"),
    ({"visual_taps": (3, 1)}, "rising"),
    ({"sigma": 1.5}, "^sigma: got 1.5; expected at least 0 and at most 1"),
    ({"sigma": ()}, r"sigma: got \(\)"),
    ({"tuning": "all"}, "tuning: got 'all'; known: lora, none, full"),
    ({"ensemble": "sum"}, "ensemble: got 'sum'; known: tokens, average"),
    ({"dtype": "int8"}, "dtype: got 'int8'"),
    ({"score_scale": 0}, "^score_scale: got 0"),
])  # fmt: skip
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_reward_config(**change)


@pytest.mark.parametrize(("base", "new", "expected"), [
    ("../pipeline", "/w/other", "../pipeline"),
    ("../pipeline", "/w/deep/er", "../../pipeline"),
    ("./base", "/w", "./dinalrm/base"),
    ("owner/name", "/w/other", "owner/name"),
    ("/abs/pipeline", "/w/other", "/abs/pipeline"),
])  # fmt: skip
def test_relative_base_ids_follow_the_checkpoint(base, new, expected, tmp_path):
    assert relocated(base, tmp_path / "w" / "dinalrm", tmp_path / new[1:]) == expected


def test_an_interrupted_write_leaves_the_old_file(folder, monkeypatch):
    from dinalrm_align.train import files

    before = (folder / "model.safetensors").read_bytes()

    def fail(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", fail)
    stored = read_checkpoint(folder)
    with pytest.raises(KeyboardInterrupt):
        write_reward(folder, stored.config, stored.tensors)
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint format: got 'pickle'; known: dinalrm, released"):
        write_reward(tmp_path, tiny_reward_config(), {}, format="pickle")


VARIANTS = {
    "other taps and rank": dict(visual_taps=(0, 2), text_taps=(1, 3), lora=LoraConfig(2, 1)),
    "text not tapped last": dict(visual_taps=(3,), text_taps=(1, 2)),
    "blocks after the last tap": dict(visual_taps=(1,), text_taps=(2,)),
    "wide head": dict(head=HeadConfig(width=24, num_attn_heads=4, num_queries=2)),
    "projected and squashed head": dict(head=HeadConfig(use_proj_in=True, use_logistic=True)),
    "frozen backbone": dict(tuning="none", lora=LoraConfig()),
    "full backbone": dict(tuning="full", lora=LoraConfig()),
    "full backbone, text not tapped last": dict(tuning="full", text_taps=(1, 2), lora=LoraConfig()),
    "no noise, kaiming": dict(add_noise=False, lora=LoraConfig(4, 8, "kaiming")),
    "ensemble by default": dict(sigma=(0.2, 0.5), ensemble="average", snap_sigma=True, image_sigma=0.1),
}


OF_OUR_LAYOUT = {
    "no conditioning of the adapters": dict(head=HeadConfig(film=False)),
    "no value gates": dict(head=HeadConfig(value_gates=False)),
    "image taps alone": dict(text_taps=()),
    "none of these": dict(text_taps=(), head=HeadConfig(film=False, value_gates=False, num_queries=1)),
    "full backbone, image taps alone": dict(tuning="full", text_taps=(), lora=LoraConfig()),
}


@pytest.mark.parametrize(
    ("variant", "format"), [*product(VARIANTS, ["dinalrm", "released"]), *product(OF_OUR_LAYOUT, ["dinalrm"])]
)
def test_every_kind_of_reward_survives_both_layouts(tiny_pipeline, tmp_path, variant, format):
    config = tiny_reward_config(**(VARIANTS | OF_OUR_LAYOUT)[variant])
    model = build_reward_model(config, tiny_pipeline.transformer, share_weights=config.tuning != "full")
    shake(model, seed=5)
    write_reward(tmp_path, config, model.tuned_tensors(), format=format)
    stored = read_checkpoint(tmp_path)
    again = build_reward_model(stored.config, tiny_pipeline.transformer, share_weights=config.tuning != "full", seed=9)
    load_tensors(again.tuned_tensors(), stored.tensors, stored.where)
    inputs = make_inputs(tiny_pipeline.transformer, height=8, width=8)
    assert stored.config == config
    assert torch.equal(again(**inputs, sigma=config.sigma), model(**inputs, sigma=config.sigma))
    scorer = LatentReward.from_pretrained(tmp_path, transformer=tiny_pipeline.transformer)
    torch.testing.assert_close(raw_scores(scorer, **inputs), model(**inputs, sigma=config.sigma))
    scorer.save_pretrained(tmp_path / "again", format=format)
    again = read_checkpoint(tmp_path / "again").tensors
    assert again.keys() == stored.tensors.keys()
    assert all(torch.equal(again[name], stored.tensors[name]) for name in again)


@pytest.mark.parametrize("variant", OF_OUR_LAYOUT)
def test_an_architecture_that_the_released_code_has_not_is_not_written_in_its_layout(variant, tmp_path):
    config = tiny_reward_config(**OF_OUR_LAYOUT[variant])
    with pytest.raises(ValueError, match="released layout has no place for a reward without .*; save as 'dinalrm'"):
        write_reward(tmp_path / "new", config, {}, format="released")
    assert not (tmp_path / "new").exists()


def test_released_configs_get_the_released_defaults(official):
    config = read_checkpoint(official).config
    assert (config.num_layers, config.visual_taps, config.text_taps) == (4, (1, 2, 4), (1, 2, 4))
    assert (config.lora, config.tuning, config.snap_sigma) == (LoraConfig(4, 8, "gaussian"), "lora", True)
    assert (config.sigma, config.image_sigma, config.score_scale, config.score_bias) == (0.4, 0.1, 0.1, 1.0)
    assert config.base_model_id == "stabilityai/stable-diffusion-3.5-medium"


def test_released_frozen_backbone_needs_no_adapter(released):
    values = json.loads((released / "config.json").read_text())
    values["model"]["freeze_backbone"] = True
    (released / "config.json").write_text(json.dumps(values))
    shutil.rmtree(released / "checkpoint" / "backbone_lora")
    stored = read_checkpoint(released)
    assert stored.config.tuning == "none" and all(name.startswith("head.") for name in stored.tensors)


@pytest.mark.parametrize("name", ["rm_head.pt", "backbone_lora/adapter_model.safetensors"])
def test_a_missing_file_of_the_released_layout_is_named(released, name):
    (released / "checkpoint" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
        read_checkpoint(released)


def test_released_head_is_never_unpickled(released):
    ran = released / "ran"

    torch.save({"query_tokens": Bomb(os.mkdir, str(ran))}, released / "checkpoint" / "rm_head.pt")
    with pytest.raises(ValueError, match="rm_head.pt: not a readable file of tensors .it asks for more than tensors"):
        read_checkpoint(released)
    assert not ran.exists()
    torch.load(released / "checkpoint" / "rm_head.pt", weights_only=False)
    assert ran.exists(), "the file is harmless: this test shows nothing"


@pytest.mark.parametrize("content", [b"", b"no tensors", b"PK\x03\x04 cut short"])
def test_a_broken_released_head_is_named(released, content):
    (released / "checkpoint" / "rm_head.pt").write_bytes(content)
    with pytest.raises(ValueError, match="rm_head.pt: not a readable file of tensors"):
        read_checkpoint(released)


def test_an_adapter_that_is_no_plain_lora_is_refused(released):
    rewrite(released / "checkpoint" / "backbone_lora" / "adapter_config.json", use_dora=True)
    with pytest.raises(ValueError, match="adapter_config.json: expected a plain LoRA of one rank; .*use_dora"):
        read_checkpoint(released)


def test_a_released_config_without_a_section_is_refused(released):
    rewrite(released / "config.json", model={"backbone_model_id": "x"})
    with pytest.raises(ValueError, match="config.json: not a reward config .*reward_head"):
        read_checkpoint(released)
