"""Preparation of latent shards in worker processes."""

from tiny_prepare import content, hpdv3, prepare


def test_worker_processes_make_the_same_files(tmp_path):
    source = hpdv3(tmp_path / "data", pairs=4)
    (tmp_path / "data" / "images" / "1_r.png").write_bytes(b"broken")
    prepare(source, tmp_path / "alone", on_bad="skip")
    prepare(source, tmp_path / "shared", workers=1, on_bad="skip")
    assert content(tmp_path / "alone") == content(tmp_path / "shared")
