"""A new draft starts in its target's terms; one that is read is all there, or refused in one sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_eagle1_pair, tiny_llama, tiny_mapping, tiny_pair
from tiny_blocks import tiny_block_pair

from hf_eagle import EagleConfig, FrozenTarget, load_draft, new_draft
from hf_eagle.drafts.build import draft_class_of


def test_it_starts_with_the_targets_rows_and_its_last_tap_passed_through():
    target = FrozenTarget(tiny_llama())
    config = EagleConfig.from_target(target.config, 40)
    mapping, drafts = tiny_mapping(), []
    for head in (None, target.head_weight()):
        torch.manual_seed(0)
        drafts.append(new_draft(config, target.embedding_weight(), mapping, head))
    random, started = drafts
    ids = mapping.t2d.nonzero()[:, 0]
    assert torch.equal(started.lm_head.weight, target.head_weight()[ids])
    assert not torch.equal(random.lm_head.weight, started.lm_head.weight)
    taps = torch.randn(5, 3 * target.hidden_size)
    last = taps[:, 2 * target.hidden_size :]
    torch.testing.assert_close(started.combine_features(taps) - random.combine_features(taps), last)


def test_taps_of_another_width_are_left_to_training():
    target = FrozenTarget(tiny_llama())
    config = EagleConfig.from_target(target.config, 40, target_hidden_size=48)
    torch.manual_seed(0)
    random = new_draft(config, target.embedding_weight(), tiny_mapping())
    torch.manual_seed(0)
    started = new_draft(config, target.embedding_weight(), tiny_mapping(), target.head_weight())
    assert torch.equal(random.fc.weight, started.fc.weight)


@pytest.fixture(params=["eagle3", "eagle1", "dflash"])
def folder(request, tmp_path):
    pairs = {"eagle3": lambda: tiny_pair(40), "eagle1": tiny_eagle1_pair, "dflash": tiny_block_pair}
    _, draft = pairs[request.param]()
    draft.save_pretrained(tmp_path)
    return tmp_path


def refused(load, folder, argument="draft", **options):
    with pytest.raises((OSError, ValueError)) as problem:
        load(folder, argument=argument, **options)
    text = str(problem.value)
    assert str(folder) in text and text.endswith(".") and "\n" not in text
    return text


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def without(name):
    return lambda folder: with_tensors(folder, lambda tensors: {n: x for n, x in tensors.items() if n != name})


def with_config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def with_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")


def renamed(folder):
    with_tensors(folder, lambda tensors: {f"base.{name}": x for name, x in tensors.items()})


def with_values(change):
    """Every matrix changed; a bias that is not zero is refused as such."""
    return lambda folder: with_tensors(
        folder, lambda tensors: {n: change(x) if n.endswith(".weight") else x for n, x in tensors.items()}
    )


def with_rope(theta):
    def change(folder):
        held = json.loads((folder / "config.json").read_text())
        with_config(rope_theta=theta, rope_parameters={**held["rope_parameters"], "rope_theta": theta})(folder)

    return change


BROKEN = [
    *[
        (with_values(lambda x, bad=bad: x * 0 + bad), "holds NaN or infinity in")
        for bad in (float("nan"), float("inf"))
    ],
    *[
        (with_values(lambda x, dtype=dtype: x.to(dtype)), "weights that are whole numbers of type")
        for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8)
    ],
    *[(with_config(rms_norm_eps=bad), "`rms_norm_eps` is") for bad in (None, float("nan"), float("inf"), -1e-5)],
    *[(with_rope(bad), "`rope_theta` is") for bad in (0, -1.0, float("nan"), float("inf"), "10000")],
    (with_file("config.json", b"[]"), "config.json must hold an object, but holds a list"),
    (with_file("config.json", b"{oops"), "config.json cannot be read as JSON"),
    (with_config(architectures=7), "must hold a list or null as `architectures`"),
    (with_config(architectures=[["x"]]), "must hold text as `architectures[0]`"),
    (with_config(architectures=None), "is not a draft: `architectures` in its config.json is []"),
    (with_config(hidden_size="x"), "hidden_size"),
    (with_config(num_hidden_layers=10**6), "`num_hidden_layers` in its config.json is 1,000,000, but its weights show"),
    (with_config(intermediate_size=10**8), "`intermediate_size` in its config.json is 100,000,000"),
    (with_config(vocab_size=10**9), "vocab"),
    (with_config(intermediate_size=41), "of another shape"),
    (without("fc.weight"), "missing: fc.weight"),
    (renamed, "missing"),
    (cut, "model.safetensors is cut"),
    (with_file("model.safetensors", b""), "model.safetensors is cut, it has 0 bytes"),
    (pickled, "its pickled weights hold more than tensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
@pytest.mark.parametrize("argument", ["draft", "init_from"])
def test_a_draft_that_is_broken(folder, change, message, argument, caplog):
    assert load_draft(folder).config.architectures
    change(folder)
    text = refused(load_draft, folder, argument)
    assert message in text and "LOAD REPORT" not in caplog.text
    if not text.startswith((f"The checkpoint {folder} does not hold exactly", f"{folder} is not a draft")):
        assert text.startswith(f"`{argument}` {folder}")


def test_a_draft_that_is_not_there(tmp_path):
    for load in (load_draft, draft_class_of):
        for argument in ("draft", "init_from"):
            assert "holds no config.json: name the folder of a draft" in refused(load, tmp_path, argument)
            assert refused(load, tmp_path / "gone", argument).startswith(f"`{argument}` {tmp_path}/gone does not exist")
        assert "is no folder here, and the Hub does not give it" in refused(load, "nobody/no-such-draft-0")
