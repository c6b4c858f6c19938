"""Merge an adapter into a folder of its own: ranks can read that in parts, and cannot read an adapter so."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, find_adapter_config_file

from ..door.json_files import read_json
from .loading import files_of_processor, load_causal_lm, load_tokenizer


def save_merged(name_or_path: str, folder: str | Path, revision: str = "main", **options: Any) -> None:
    """Merge an adapter into its base and save the result with tokenizer and processor, for ranks that read it in parts.

    Keep a folder that this adapter was merged into before; refuse one of another adapter.

    Args:
        name_or_path, revision, options: as in [`load_causal_lm`].
        folder: written as a whole: an interrupted call leaves none.

    Raises:
        FileExistsError: if the folder holds something else.
    """
    folder, whose = Path(folder), _adapter_fingerprint(name_or_path, revision)
    label = folder / "merged_from.json"
    if label.is_file() and read_json(label, {"adapter_sha256": str}, "delete the folder")["adapter_sha256"] == whose:
        return

    if folder.exists():
        raise FileExistsError(f"{folder} is in the way of merging `target` {name_or_path}: delete it, or move it away.")

    # write elsewhere and rename last, so that nobody reads half a model
    part = folder.with_name(f".{folder.name}-part")
    shutil.rmtree(part, ignore_errors=True)
    load_causal_lm(name_or_path, revision, **options).save_pretrained(part)
    tokenizer_options = {key: options[key] for key in ("trust_remote_code",) if key in options}
    load_tokenizer(name_or_path, revision, **tokenizer_options).save_pretrained(part)
    for file in files_of_processor(name_or_path, revision):
        shutil.copyfile(file, part / file.name)
    (part / label.name).write_text(json.dumps({"adapter": str(name_or_path), "adapter_sha256": whose}) + "\n")
    part.rename(folder)


def _adapter_fingerprint(name_or_path: str, revision: str) -> str:
    """SHA-256 of an adapter's config and weights."""
    digest = hashlib.sha256(Path(find_adapter_config_file(str(name_or_path), revision=revision)).read_bytes())
    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        file = cached_file(str(name_or_path), name, revision=revision, **quiet)
        if file is not None:
            digest.update(Path(file).read_bytes())

    return digest.hexdigest()
