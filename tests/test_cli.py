"""The command line: quick to start, one sentence for an error, an exit code that tells the truth."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from iir_dist.cli import main
from iir_dist.config import STAGES

HEAVY = ("torch", "torchvision", "ray", "faiss", "pyarrow", "numpy", "pydantic", "boto3", "PIL", "matplotlib")


def iir(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("code", ["import iir_dist", "from iir_dist.cli import main; main(['--help'])"])
def test_nothing_heavy_is_loaded_to_start(code: str) -> None:
    check = f"""
import sys
try:
    {code}
except SystemExit:
    pass
print("LOADED", [name for name in {HEAVY!r} if name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself(name: str) -> None:
    for flag in ("-h", "--help"):
        code, output = iir(name, flag)
        assert code == 0
        assert "Usage:" in output
    if name in STAGES:
        assert "--config" in output
        assert "--set" in output
        assert f"Keys of [{name}]" in output
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"iir {name}" in readme


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["ingest", "/no/such/place", "--out", "OUT"], ["/no/such/place", "does not exist"]),
        (["ingest", "OUT/empty", "--out", "OUT/x"], ["holds no image", ".jpg"]),
        (["embed", "OUT/nothing", "--encoder", "OUT/nothing", "--out", "OUT/x"], ["nothing", "no manifest.json"]),
        (["index", "OUT/nothing", "--out", "OUT/x"], ["nothing", "expected the output of embed"]),
        (["search", "OUT/nothing", "--queries", "OUT/nothing", "--out", "OUT/x"], ["no manifest.json"]),
        (["evaluate", "OUT/nothing", "--groundtruth", "OUT/none.pkl", "--out", "OUT/x"], ["no manifest.json"]),
        (
            ["encoder", "--out", "OUT/x", "--set", "backbone=vgg"],
            ["encoder.backbone = 'vgg'", "known: convnext_base"],
        ),
        (["encoder", "--out", "OUT/x", "--set", "sise=3"], ["encoder.sise is not a known key", "known: backbone"]),
        (["encoder", "--out", "OUT/x", "--config", "OUT/none.toml"], ["cannot read the config file", "none.toml"]),
        (["verify", "OUT"], ["no manifest.json", "nothing to verify"]),
        (["verify", "gs://bucket/x"], ["'gs'", "s3://bucket/prefix"]),
        (["demo", "--data", "OUT/empty", "--out", "OUT/x"], ["lacks wonders11.tar"]),
    ],
)
def test_errors_are_one_sentence_and_a_code(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    code, output = iir(*(a.replace("OUT", str(tmp_path)) for a in arguments))
    assert code == 1
    assert output.startswith("Error: ")
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1
    for part in parts:
        assert part in output


def test_usage_errors(tmp_path: Path) -> None:
    assert iir("ingest")[0] == 2
    assert iir("nonsense")[0] == 2
    code, output = iir("search", "x", "--queries", "y", "--out", "z", "-k", "0")
    assert code == 2
    assert "0 is not in the range" in output


def test_stages_by_config_file_and_settings(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        "[encoder]\nbackbone = 'resnet18'\nweights = 'random'\nsize = 96\n[index]\nshards = 4\n"
    )
    arguments = ["encoder", "--out", str(tmp_path / "e"), "--config", str(tmp_path / "c.toml"), "--set", "p=2.0"]
    code, output = iir(*arguments)
    assert code == 0
    assert re.search(r"e: encoder [0-9a-f]{12}, \d+ parameters", output)
    assert iir("verify", str(tmp_path / "e"))[1].strip().endswith("encoder, 2 files as written")
    assert iir(*arguments)[0] == 0
    code, output = iir(*arguments, "--set", "size=128")
    assert code == 1
    assert "config.size: 96 there, 128 now" in output
    assert iir(*arguments, "--set", "size=128", "--force")[0] == 0
    weights = tmp_path / "e" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, output = iir("verify", str(tmp_path / "e"))
    assert code == 1
    assert "weights.safetensors has other content" in output


def test_interrupting_gives_another_code(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a stage is neither success nor a traceback."""
    script = (
        "import iir_dist.artifact as a\n"
        "def stop(*_, **__): raise KeyboardInterrupt\n"
        "a.begin = stop\n"
        "from iir_dist.cli import main\n"
        f"main(['encoder', '--out', {str(tmp_path / 'e')!r}, '--set', 'backbone=resnet18', '--set', 'weights=random'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Aborted" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_doctor(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = iir("doctor")
    for part in ("version of torch", "CPU cores", "memory", "GPUs", "Ray", "object store"):
        assert part in output
    assert code == (1 if "PROBLEM" in output else 0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    code, output = iir("doctor", "--store", "gs://x")
    assert code == 1
    assert "PROBLEM: 'gs://x'" in output


@pytest.mark.s3
def test_doctor_tries_the_store(s3: str) -> None:
    from iir_dist.doctor import _store

    assert not _store(s3).problem
    assert "does not exist" in _store("s3://no-such-bucket").problem


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
def test_progress_is_plain_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    from iir_dist.progress import Progress

    with caplog.at_level("INFO", "iir_dist"), Progress("embed", 10, "images", done=4, every_sec=0) as progress:
        progress.advance(3, "loss 1.2")
    lines = [r.getMessage() for r in caplog.records]
    assert re.fullmatch(r"embed: 7/10 images, [\d.]+/s, \d+ s, \d+ s remaining, loss 1\.2", lines[0])
    assert lines[-1].startswith("embed: 7/10 images")
    assert lines[-1].endswith("done")
