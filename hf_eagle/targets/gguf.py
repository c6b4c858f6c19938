"""Turn a GGUF file, the format of llama.cpp and Ollama, into a folder that transformers, vLLM and SGLang load."""

import os
import shutil
import tempfile
from pathlib import Path


def convert_gguf(
    folder: str | os.PathLike, gguf_file: str, output_dir: str | os.PathLike, rms_norm_eps: float | None = None
) -> Path:
    """
    Dequantise `folder/gguf_file` and save model, tokenizer and chat template as an ordinary checkpoint.

    Weights are written in float32, exactly as dequantised: rounding them again would make another model. The folder
    appears whole or not at all, so it is usable as soon as it exists.

    Args:
        folder (`str` or `os.PathLike`):
            The folder of the GGUF file.
        gguf_file (`str`):
            Its name in `folder`. Any architecture that transformers reads from GGUF.
        output_dir (`str` or `os.PathLike`):
            The folder to write. It must be empty, or not exist yet.
        rms_norm_eps (`float`, *optional*):
            Epsilon of the RMSNorms. By default the file's own, read as the decimal number that it was before being
            stored in 32 bits (1e-05, not 9.999999747378752e-06).

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileNotFoundError: when there is no such GGUF file.
        FileExistsError: when `output_dir` holds something already.
        ImportError: when the `gguf` package is missing.
    """
    source, output_dir = Path(folder) / gguf_file, Path(output_dir)
    if not source.is_file():
        raise FileNotFoundError(
            f"`gguf_file` {source} does not exist; pass the folder and the name of a GGUF file in it."
        )
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"`output_dir` {output_dir} is not empty; remove it or name another folder.")

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # next to `output_dir`, so that the last step is a rename on the same disk
    part = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        _convert(source, part, rms_norm_eps)
        part.chmod(0o755)  # mkdtemp's 0700 would hide the model from other users
        os.replace(part, output_dir)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return output_dir


def _convert(source: Path, output_dir: Path, rms_norm_eps: float | None) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ImportError("Reading a GGUF file needs the `gguf` package: pip install 'hf_eagle[gguf]'.")

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)

    # transformers refuses to save a model with a GGUF quantizer, so move the weights to a model that never had one
    fields = {
        k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")
    }
    config = type(loaded.config).from_dict(fields)
    if hasattr(config, "rms_norm_eps"):
        config.rms_norm_eps = rms_norm_eps or float(str(np.float32(config.rms_norm_eps)))

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()

    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for file in output_dir.iterdir():
        file.chmod(0o644)
