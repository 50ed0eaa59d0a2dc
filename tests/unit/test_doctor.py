"""What `prefopt doctor` says, here and on machines with something wrong."""

import json

import pytest

from prefopt.config import doctor


def test_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret_token")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, _ = doctor.doctor_text()
    assert "0123456789abcdef" not in text and "hf_very" not in text
    for what in ("python", "cores", "torch", "hydra-core", "W&B key", "HF token", "HF_HUB_OFFLINE", "tiny-lm"):
        assert f" {what} " in text
    assert "not made yet" in text
    (tmp_path / "cache" / "tiny-lm-abc").mkdir(parents=True)
    (tmp_path / "cache" / "tiny-lm-abc" / "config.json").write_text(json.dumps({}))
    assert "made\n" in doctor.doctor_text()[0]


def test_problems(monkeypatch, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("PREFOPT_CACHE", str(blocker / "cache"))
    wanted = ["torch>=99", "no-such-package-here>=1", "pyyaml", 'trl>=99; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA H100, 80 GiB, driver 1"])
    monkeypatch.setattr(doctor, "torch_build", lambda: "cpu")
    text, healthy = doctor.doctor_text()
    assert not healthy and "4 problems to mend" in text
    assert 'pip install "torch>=99"' in text and 'pip install "no-such-package-here>=1"' in text
    assert "PREFOPT_CACHE" in text and "CUDA build" in text


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'NVIDIA L4, 23034 MiB, 550.1'", ["NVIDIA L4, 23034 MiB, driver 550.1"]),
        ("echo 'No devices were found'; exit 6", []),
        ("echo 'Driver mismatch'; exit 18", "nvidia-smi fails: Driver mismatch; mend the driver"),
    ],
)
def test_nvidia_smi(monkeypatch, tmp_path, script, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._gpus() == found


@pytest.mark.parametrize(
    ("version", "build"),
    [("2.10.0+cpu", "cpu"), ("2.10.0+cu128", "cuda 12.8"), ("2.10.0+rocm6.4", "rocm 6.4"), (None, None)],
)
def test_torch_build(monkeypatch, version, build):
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert doctor.torch_build() == build


@pytest.mark.parametrize(
    ("version", "wanted", "answer"),
    [
        ("1.3.8", ">=1.3.2,<1.4", True), ("1.4", ">=1.3.2,<1.4", False), ("1.4.0", "<1.4", False),
        ("2.13.0+cpu", ">=2.10", True), ("2.9.1", ">=2.10", False), ("4", ">=4.0", True), ("3.1", "", True),
        ("1.5.2", "~=1.4", True), ("2.0", "~=1.4", False),
    ],
)  # fmt: skip
def test_versions(version, wanted, answer):
    assert doctor._satisfies(version, wanted) is answer
