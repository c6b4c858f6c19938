"""Every form of draft that is imported: recognised, with the logits of its project's mathematics, in our own folder."""

import json
import logging

import foreign_folders
import pytest
import torch
from foreign_folders import DRAFT_VOCAB, FORMS, HEADS, TAP_IDS, write
from foreign_math import ForeignDraft
from safetensors.torch import load_file
from tiny import unrolled
from tiny_mla import SIZES, YARN
from transformers import DynamicCache

from hf_eagle import load_draft
from hf_eagle.foreign.convert import from_foreign


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# form -> what its config says of the mathematics, restated by hand
MATHEMATICS = {
    "eagle1": {"eps": 1e-6},
    "eagle3": {"eps": 1e-5},
    "specforge": {"eps": 1e-6, "theta": 1e6},
    "modelopt": {"eps": 1e-6, "theta": 5e5},
    "speculators": {"eps": 1e-6, "theta": 7e4, "feeds_normed": True},
    "nemo": {"eps": 1e-6, "theta": 5e5, "scaling": LLAMA3, "feeds_normed": True},
    "torchspec": {"eps": 1e-5, "theta": 5e4, "scaling": YARN, "latent": SIZES},
}
TAPS = {"specforge": [1, 3, 7], "speculators": [1, 4, 7]}  # all others: the default of a target of 8 layers
DEFAULT_TAPS = [2, 4, 5]


def our_logits(draft, target, tokens, taps):
    """The last of the rows with taps, then one row more a token, behind a cache; over the target's vocabulary."""
    draft.attach(target)
    cache, found, given = DynamicCache(), [], len(taps)
    hidden = draft.combine_features(taps)[None]
    with torch.no_grad():
        for start, end in [(0, given), *((i, i + 1) for i in range(given, len(tokens)))]:
            positions = torch.arange(start, end)[None]
            out, fed = draft.decode(torch.tensor([tokens[start:end]]), hidden, positions, cache)
            found.append(draft.compute_logits(out[0, -1]))
            hidden = fed[:, -1:]
    return over_target(draft, torch.stack(found))


def over_target(draft, logits):
    if draft.draft_ids is None:
        return logits
    full = torch.full((len(logits), draft.config.vocab_size), float("-inf"))
    return full.index_copy(1, draft.draft_ids, logits)


def random_rows(draft, vocab, rows=5, steps=4):
    g = torch.Generator().manual_seed(7)
    width = draft.config.hidden_size * (len(draft.config.tap_ids) or 1)
    return torch.randint(0, vocab, (rows + steps,), generator=g).tolist(), torch.randn(rows, width, generator=g)


@pytest.mark.parametrize("build", FORMS)
def test_an_imported_draft_computes_what_its_project_says(build, target_folder, target, embedding, tmp_path, caplog):
    form = build.__name__
    config, tensors = build(embedding)
    with caplog.at_level(logging.INFO, "hf_eagle"):
        imported = from_foreign(write(tmp_path / "foreign", config, tensors), target_folder)
    assert f"in the form `{form}`" in caplog.text
    imported.save_pretrained(tmp_path / "ours")
    draft = load_draft(tmp_path / "ours")

    tokens, taps = random_rows(draft, len(embedding))
    restated = ForeignDraft(tensors, embedding, target.head_weight(), HEADS, **MATHEMATICS[form])
    wanted = restated.decode(tokens, taps)
    assert wanted.isfinite().sum(1).tolist() == [len(embedding) if form in ("eagle1", "torchspec") else DRAFT_VOCAB] * 5
    found = our_logits(draft, target, tokens, taps)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.argmax(1), wanted.argmax(1))

    if form != "eagle1":  # the training-time test is the same function: the last row, step after step
        features = torch.cat([taps, torch.zeros(5, taps.shape[1])])[None]
        rows = torch.tensor([len(taps) - 1])
        with torch.no_grad():
            hidden = unrolled(draft, torch.tensor([[0, *tokens]]), features, rows, num_steps=5).hidden_states[:, 0]
            torch.testing.assert_close(over_target(draft, draft.compute_logits(hidden)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", FORMS)
def test_what_is_saved_is_our_folder(build, target_folder, target, embedding, tmp_path):
    form = build.__name__
    config, tensors = build(embedding)
    from_foreign(write(tmp_path / "foreign", config, tensors), target_folder).save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["vocab_size"] == len(embedding) and written["num_hidden_layers"] == 1
    yarn = MATHEMATICS[form].get("scaling", {}) if "latent" in MATHEMATICS[form] else {}
    reached = yarn.get("factor", 0) * yarn.get("original_max_position_embeddings", 0)  # what vLLM takes with YaRN
    assert written["max_position_embeddings"] == max(target.config.max_position_embeddings, reached)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == MATHEMATICS[form].get("theta", 1e4)
    assert written["rms_norm_eps"] == MATHEMATICS[form]["eps"]
    assert written["dtype"] == written["torch_dtype"] == "float32"  # as the tensors are, not as its config says
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert not {"embed_tokens.weight", "verifier_lm_head.weight"} & set(saved)
    if form == "eagle1":
        assert "fc.bias" in saved and not saved["fc.bias"].any() and TAP_IDS not in written
        return
    assert written[TAP_IDS] == TAPS.get(form, DEFAULT_TAPS)
    assert written["eagle_config"][TAP_IDS] == [i - 1 for i in written[TAP_IDS]]
    assert (written["fc_norm"], written["norm_output"]) == (
        (True, True) if form in ("speculators", "nemo") else (False,) * 2
    )
    if form == "torchspec":
        assert written["model_type"] == "kimi_k2" and "d2t" not in saved
    else:
        ids = torch.arange(DRAFT_VOCAB) + saved["d2t"]
        assert (ids[1:] > ids[:-1]).all() and torch.equal(saved["t2d"].nonzero()[:, 0], ids)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_other_files_hold_the_same_draft(weights, target_folder, embedding, tmp_path):
    config, tensors = foreign_folders.eagle3(embedding)
    one = from_foreign(write(tmp_path / "one", config, tensors), target_folder)
    tensors["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer that old checkpoints hold
    other = from_foreign(write(tmp_path / "other", config, tensors, weights), target_folder)
    own = {name: x for name, x in one.state_dict().items() if name not in one.lent_tensors}
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in own.items())


def test_the_dtype_is_the_tensors(target_folder, embedding, tmp_path):
    config, tensors = foreign_folders.specforge(embedding.half())
    tensors = {n: x.half() if x.is_floating_point() else x for n, x in tensors.items()}
    assert config["torch_dtype"] == "bfloat16"
    draft = from_foreign(write(tmp_path / "half", config, tensors), target_folder)
    assert draft.dtype == draft.config.dtype == torch.float16
    tensors["norm.weight"] = tensors["norm.weight"].float()
    draft = from_foreign(write(tmp_path / "mixed", config, tensors), target_folder)
    assert draft.dtype == torch.float32 and torch.equal(draft.fc.weight, tensors["fc.weight"].float())


def test_a_whole_vocabulary_needs_no_mapping(target_folder, target, embedding, tmp_path):
    """SpecForge stores one all the same; ModelOpt could store it in another order."""
    config, tensors = foreign_folders.specforge(embedding)
    vocab = len(embedding)
    config["draft_vocab_size"] = vocab
    tensors |= foreign_folders.around(vocab)
    tensors |= {"d2t": torch.zeros(vocab, dtype=torch.long), "t2d": torch.ones(vocab, dtype=torch.bool)}
    draft = from_foreign(write(tmp_path / "plain", config, tensors), target_folder)
    assert draft.d2t is None and torch.equal(draft.lm_head.weight, tensors["lm_head.weight"])
    turned = torch.arange(vocab).flip(0)
    tensors |= {"d2t": turned - torch.arange(vocab), "lm_head.weight": tensors["lm_head.weight"][turned]}
    again = from_foreign(write(tmp_path / "turned", config, tensors), target_folder)
    assert again.d2t is None and torch.equal(again.lm_head.weight, draft.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "taps"),
    [
        ({"eagle_config": {TAP_IDS: [1, 3, 8]}}, [1, 3, 8]),  # no layer's output is 8: these are entries
        ({TAP_IDS: [2, 3, 6], "eagle_config": {TAP_IDS: [1, 2, 5]}}, [2, 3, 6]),  # vLLM's field is one of entries
        ({"eagle_config": None}, DEFAULT_TAPS),
    ],
)
def test_tap_ids_are_read_as_their_writer_counts(change, taps, target_folder, embedding, tmp_path):
    config, tensors = foreign_folders.specforge(embedding)
    assert from_foreign(write(tmp_path, config | change, tensors), target_folder).config.tap_ids == taps


def test_torchspecs_export_for_vllm_counts_entries(target_folder, embedding, tmp_path):
    config, tensors = foreign_folders.torchspec(embedding)
    config["eagle_config"][TAP_IDS] = [2, 3, 6]
    tensors = {name.replace("midlayer.", "layers.0."): x for name, x in tensors.items()}
    draft = from_foreign(write(tmp_path / "kimi", config, tensors), target_folder)
    assert draft.config.tap_ids == [2, 3, 6]
    draft = from_foreign(write(tmp_path / "other", config | {"model_type": "deepseek_v3"}, tensors), target_folder)
    assert draft.config.tap_ids == [3, 4, 7]


def test_what_the_files_do_not_say_can_be_given(target_folder, target, embedding, tmp_path, caplog):
    """Taps that NeMo does not write down, and the RoPE base with which TorchSpec trains under YaRN."""
    config, tensors = foreign_folders.nemo(embedding)
    draft = from_foreign(write(tmp_path / "nemo", config, tensors), target_folder, tap_ids=[0, 3, 8])
    assert draft.config.tap_ids == [0, 3, 8]

    config, tensors = foreign_folders.torchspec(embedding)
    with caplog.at_level(logging.WARNING, "hf_eagle"):
        from_foreign(write(tmp_path / "torchspec", config, tensors), target_folder)
    assert "TorchSpec trains with RoPE base 10000" in caplog.text
    draft = from_foreign(tmp_path / "torchspec", target_folder, rope_theta=10000.0)
    tokens, taps = random_rows(draft, len(embedding))
    trained = MATHEMATICS["torchspec"] | {"theta": 10000.0}
    wanted = ForeignDraft(tensors, embedding, None, HEADS, **trained).decode(tokens, taps)
    torch.testing.assert_close(our_logits(draft, target, tokens, taps), wanted, rtol=1e-4, atol=1e-5)


def test_a_trained_bias_of_eagle1_is_left_out_only_when_told_to(target_folder, target, embedding, tmp_path):
    config, tensors = foreign_folders.eagle1(embedding)
    biased = tensors | {"fc.bias": torch.ones(32)}
    write(tmp_path, config, biased)
    with pytest.raises(ValueError, match="`fc.bias` of this draft was trained: vLLM drops it and SGLang adds it"):
        from_foreign(tmp_path, target_folder)
    draft = from_foreign(tmp_path, target_folder, drop_fc_bias=True)
    tokens, taps = random_rows(draft, len(embedding))
    wanted = ForeignDraft(tensors, embedding, target.head_weight(), HEADS, eps=1e-6).decode(tokens, taps)
    torch.testing.assert_close(our_logits(draft, target, tokens, taps), wanted, rtol=1e-4, atol=1e-5)


def test_a_form_can_be_named(target_folder, embedding, tmp_path, caplog):
    config, tensors = foreign_folders.modelopt(embedding)
    config["eagle_config"] = {TAP_IDS: [1, 3, 4]}  # nothing is left that shows ModelOpt
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match="The form of this draft is not known"):
        from_foreign(tmp_path, target_folder)
    assert from_foreign(tmp_path, target_folder, form="modelopt").config.tap_ids == DEFAULT_TAPS


def test_specforge_without_a_norm_to_feed_back_is_no_cause_for_a_warning(target_folder, embedding, tmp_path, caplog):
    """Its earlier versions fed back the un-normed output, which is what `norm_output: false` says."""
    draft = from_foreign(write(tmp_path, *foreign_folders.specforge(embedding, norm_output=False)), target_folder)
    assert draft.config.norm_output is False and "fed back" not in caplog.text


def test_specforges_norm_output_is_what_the_servers_read(target_folder, target, embedding, tmp_path, caplog):
    config, tensors = foreign_folders.specforge(embedding, fc_norm=True, norm_output=True)
    draft = from_foreign(write(tmp_path, config, tensors), target_folder)
    assert "SpecForge before September 2026 ignored it and fed back the un-normed output" in caplog.text
    tokens, taps = random_rows(draft, len(embedding))
    wanted = ForeignDraft(tensors, embedding, None, HEADS, eps=1e-6, theta=1e6, feeds_normed=True).decode(tokens, taps)
    torch.testing.assert_close(our_logits(draft, target, tokens, taps), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("project", ["speculators", "hf_eagle", "specforge"])
def test_only_a_window_of_training_is_kept(project, target_folder, embedding, tmp_path, caplog):
    """SpecForge and others copy a target's keys, and train without a window."""
    slides = {"layer_types": ["sliding_attention"], "sliding_window": 12}
    if project == "speculators":
        config, tensors = foreign_folders.speculators(embedding)
        config["transformer_layer_config"] |= slides
    else:
        config, tensors = foreign_folders.specforge(embedding)
        config |= slides | ({"draft_sliding_window": 12} if project == "hf_eagle" else {})

    with caplog.at_level(logging.WARNING, "hf_eagle"):
        draft = from_foreign(write(tmp_path / "foreign", config, tensors), target_folder)
    kept = project != "specforge"
    assert draft.config.draft_sliding_window == (12 if kept else None)
    assert ("shows s keys more" in caplog.text) == (project == "speculators")

    draft.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: written.get(name) for name in slides} == (slides if kept else dict.fromkeys(slides))
