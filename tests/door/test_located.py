"""What is wrong with a field of a draft's config is told with argument, folder and file, whatever the kind of draft."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_eagle.door.reading import locating
from hf_eagle.door.sentences import is_sentence
from hf_eagle.drafts.build import load_draft
from hf_eagle.drafts.kinds import KINDS


DRAFTS = [(kind, architecture) for kind in KINDS.values() for architecture in kind.architectures]
SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    **{"intermediate_size": 24, "max_position_embeddings": 64, "num_hidden_layers": 1},
}
# what a new config of a kind needs besides
NEEDED = {"dflash": {"target_layer_ids": [1, 3, 5], "num_target_layers": 8, "mask_token_id": 1}}
# fields of config.json with values that no draft may have
BROKEN = [
    *[("draft_vocab_size", value) for value in (7_000, 41, 0, -3, "many")],
    *[("num_hidden_layers", value) for value in (2, 0, "one")],
    *[("vocab_size", 41), ("hidden_size", "wide"), ("num_attention_heads", 3), ("image_embeddings", "smell")],
    *[("eagle_aux_hidden_state_layer_ids", ["first"]), ("tie_word_embeddings", True)],
    ("rope_parameters", {"rope_type": "nobody", "rope_theta": 1.0}),
]


@pytest.fixture(params=DRAFTS, ids=lambda of: of[1])
def folder(request, tmp_path):
    kind, architecture = request.param
    made = kind.draft_class(architecture)
    own = {"draft_vocab_size": 24} if "draft_vocab_size" not in kind.meaningless else NEEDED.get(kind.name, {})
    made(made.config_class(**SIZES, **own, architectures=[architecture])).save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def refused(folder, argument: str) -> str:
    with pytest.raises((OSError, ValueError)) as problem:
        load_draft(folder, argument=argument)
    said = str(problem.value)
    assert is_sentence(problem.value) and "\n" not in said and said.endswith((".", "?"))
    return said


@pytest.mark.parametrize("argument", ["draft", "init_from"])
@pytest.mark.parametrize(("field", "value"), BROKEN)
def test_a_broken_field(folder, field, value, argument):
    tensors = load_file(folder / "model.safetensors").values()
    if field == "vocab_size" and not any(SIZES["vocab_size"] in x.shape for x in tensors):
        pytest.skip("only a target can tell: the folder holds no table and no head")

    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(folder, argument)
    if not said.startswith(f"The checkpoint {folder} does not hold exactly"):  # the shapes are what does not fit
        assert said.startswith(f"`{argument}` {folder}")
        assert "config.json" in said or field == "rope_parameters"
        assert f"`{argument}`" not in said[1:] and said.count(str(folder)) == 1


def test_a_broken_table_of_tokens(folder):
    """A kind without one has nothing to break."""
    tensors = load_file(folder / "model.safetensors")
    if "d2t" in tensors:
        tensors["d2t"] = torch.zeros_like(tensors["d2t"]) - 5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert refused(folder, "init_from").startswith(f"`init_from` {folder} cannot be read: in its weights, `d2t`")


def test_no_draft_at_all(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert refused(folder, "init_from").startswith(f"`init_from` {folder} is not a draft")


def test_what_names_its_place_and_what_is_not_ours_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="^of a library$"), locating("draft", tmp_path, "config.json"):
        exec('raise ValueError("of a library")')
