"""A RoPE scaling that was asked for: what is taken, what is refused, and what every kind of draft makes of it."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_configuration import ROPES, target_config
from tiny_mla import YARN
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_eagle.arguments.groups import DraftArguments, TargetArguments
from hf_eagle.drafts.build import class_of
from hf_eagle.drafts.kinds import KINDS
from hf_eagle.drafts.rope import check_rope_scaling, positions_for
from hf_eagle.serving.draft_folder import TargetFacts
from hf_eagle.serving.rules_sglang import needed_positions
from hf_eagle.training.parts import config_of_draft


YARN_LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {name: x for name, x in ROPES["llama3"].items() if name != "rope_theta"}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": LLAMA3,
    "yarn": YARN_LONG,
    "yarn with a base": {**{name: x for name, x in YARN.items() if "mscale" not in name}, "truncate": False},
    "yarn for a shorter context": {**YARN_LONG, "factor": 1.5},
}
TARGETS = {
    "plain": {"rope_type": "default", "rope_theta": 7e4},
    "linear": {"rope_type": "linear", "rope_theta": 7e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 7e4, "factor": 2.0},
    "llama3": {**LLAMA3, "rope_theta": 7e4},
}


def made(scaling, method="eagle3", attention="auto", rope=TARGETS["plain"], target=None):
    target = target or target_config(rope_parameters=dict(rope))
    said = {"draft_rope_scaling": None if scaling is None else json.dumps(scaling)}
    others = {"draft_attention": attention} if method == "eagle3" else {}
    return config_of_draft(target, TargetArguments("t"), DraftArguments(method=method, **said, **others))


def methods():
    return [next(iter(kind.methods)) for kind in KINDS.values()]


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_has_it_in_both_spellings_instead_of_the_targets(method, name, target, tmp_path, caplog):
    config = made(SCALINGS[name], method, rope=TARGETS[target])
    wanted = {"rope_theta": 7e4, **SCALINGS[name]}
    assert config.rope_parameters == wanted
    assert "is not copied" not in caplog.text  # what the target has is not spoken of

    config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    scaling = {field: x for field, x in wanted.items() if field != "rope_theta"}
    assert found["rope_parameters"] == wanted and found["rope_theta"] == wanted["rope_theta"]
    assert found["rope_scaling"] == (None if scaling == {"rope_type": "default"} else scaling)
    again = type(config).from_pretrained(tmp_path)
    assert again.rope_parameters == wanted
    assert torch.isfinite(class_of(config.architectures)(again).rotary_emb.inv_freq).all()
    assert "does not match" not in caplog.text  # transformers', about a context of another length


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("scaling", [None, *SCALINGS.values()])
@pytest.mark.parametrize("target", TARGETS)
def test_no_scaling_makes_a_context_shorter_than_the_targets(method, scaling, target):
    """By the serving rules, which restate SGLang, against the configs that are made."""
    config = made(scaling, method, rope=TARGETS[target])
    facts = TargetFacts.of(target_config(rope_parameters=dict(TARGETS[target])))
    assert config.max_position_embeddings >= max(facts.max_positions, needed_positions(config.to_dict(), facts))


def test_positions_are_the_targets_where_nothing_stretches():
    assert positions_for({"rope_type": "default"}, target_config(), 8192) == 8192
    assert positions_for(YARN_LONG, target_config(), 8192) == 8192


def test_latent_attention_takes_what_its_servers_read():
    for scaling in (SCALINGS["default"], YARN_LONG, YARN):
        assert made(scaling, attention="mla").rope_parameters == {"rope_theta": 7e4, **scaling}
    deepseek = DeepseekV3Config(num_hidden_layers=8, rope_parameters=dict(YARN))
    assert made({"rope_type": "default"}, target=deepseek).rope_parameters["rope_type"] == "default"
    for name in ("linear", "llama3", "yarn with a base"):
        with pytest.raises(ValueError, match="latent.*`draft_rope_scaling`|`draft_rope_scaling`.*latent"):
            made(SCALINGS[name], attention="mla")


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("value", [0.7, 1.0])
def test_what_servers_read_in_latent_attention_alone_is_refused_elsewhere(method, value):
    pair = {"mscale": value, "mscale_all_dim": value}
    with pytest.raises(ValueError, match="`draft_rope_scaling`.* holds `mscale` = .*in latent attention only"):
        made({**YARN_LONG, **pair}, method)
    with pytest.raises(ValueError, match="holds `mscale` = "):
        made({**YARN_LONG, **pair}, method, **({"attention": "llama"} if method == "eagle3" else {}))
    deepseek = DeepseekV3Config(num_hidden_layers=8, rope_parameters={**YARN, **pair})
    if method == "eagle3":
        assert made(None, attention="auto", target=deepseek).rope_parameters == {**YARN, **pair}
        assert not set(pair) & set(made(None, attention="llama", target=deepseek).rope_parameters)
    else:
        assert not set(pair) & set(made(None, method, target=deepseek).rope_parameters)


@given(st.floats(1, 50, allow_nan=False) | st.integers(1, 50), st.integers(1, 8192), st.sampled_from(["mla", "llama"]))
def test_a_context_of_yarn_is_what_it_reaches_or_the_targets(factor, original, attention):
    """vLLM takes `factor` times the original length; plain `AutoConfig` warns if the config says less, or more."""
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    assert made(scaling, attention=attention).max_position_embeddings == max(8192, round(factor * original))


def test_a_scaling_that_begins_beyond_the_target_is_refused_and_one_that_ends_early_is_told(caplog):
    for scaling in (YARN_LONG, LLAMA3):
        with pytest.raises(ValueError, match="must be at most the target's 8192 positions, got 1000000: it is the"):
            made({**scaling, "original_max_position_embeddings": 1_000_000})
    assert caplog.text == ""
    made({**YARN_LONG, "factor": 1.5})
    assert "`draft_rope_scaling` reaches 3072 of the target's 8192 positions" in caplog.text


def test_types_are_known_to_the_installed_transformers():
    for name in SCALINGS.values():
        assert check_rope_scaling(name)["rope_type"] in ("default", *ROPE_INIT_FUNCTIONS)
    for name in set(ROPE_INIT_FUNCTIONS) - {"default", "linear", "llama3", "yarn"}:
        with pytest.raises(ValueError, match="which transformers and both servers run alike, got"):
            check_rope_scaling({"rope_type": name, "factor": 2.0})


def test_the_older_spelling_of_the_type_is_read():
    assert check_rope_scaling({"type": "linear", "factor": 2}) == {"rope_type": "linear", "factor": 2}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ([1], "`draft_rope_scaling` must be a JSON object, got"),
        ({"factor": 2.0}, "`rope_type` of `draft_rope_scaling` must be one of default, linear, llama3, yarn.*got None"),
        ({"rope_type": 3}, "got 3"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "got two of them"),
        ({"rope_type": "linear"}, "of type linear lacks `factor`"),
        ({"rope_type": "yarn", "factor": 2.0}, "lacks `original_max_position_embeddings`"),
        ({"rope_type": "default", "factor": 2.0}, "holds `factor`, which is not read of type default"),
        ({**YARN_LONG, "attention_factor": 1.2}, "holds `attention_factor`"),
        ({"rope_type": "linear", "factor": 0.5}, "`factor` of `draft_rope_scaling` must be at least 1, got 0.5"),
        ({"rope_type": "linear", "factor": 1e300}, "`factor` of `draft_rope_scaling` must be at most 10,000, got 1e"),
        ({"rope_type": "linear", "factor": "2"}, "`factor` of .* must be a number, got '2'"),
        ({"rope_type": "linear", "factor": True}, "must be a number, got True"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 0}, "`rope_theta` of .* must be above 0"),
        ({**YARN_LONG, "original_max_position_embeddings": 1.5}, "must be a whole number of at least 1"),
        ({**YARN_LONG, "truncate": 1}, "`truncate` of .* must be true or false"),
        ({**YARN_LONG, "beta_fast": 1, "beta_slow": 2}, "`beta_slow` of .* must be below `beta_fast` 1, got 2"),
        ({**YARN_LONG, "mscale": 1.0}, "both `mscale` and `mscale_all_dim`"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "`low_freq_factor` of .* must be below `high_freq_factor`"),
    ],
)
def test_what_would_be_served_otherwise_is_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        DraftArguments(draft_rope_scaling=json.dumps(scaling))


def test_text_that_is_no_json_and_rope_by_axes_are_refused():
    with pytest.raises(ValueError, match="`draft_rope_scaling` is not JSON"):
        DraftArguments(draft_rope_scaling="yarn")
    with pytest.raises(ValueError, match="cannot be combined with `draft_rope` mrope"):
        DraftArguments(draft_rope_scaling=json.dumps(YARN_LONG), draft_rope="mrope")


FIELDS = ["rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "mscale", "low_freq_factor"]
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["yarn"]))


@given(st.dictionaries(st.sampled_from([*FIELDS, "x"]), st.one_of(VALUES, st.lists(VALUES, max_size=2))))
def test_anything_is_a_scaling_or_one_sentence(scaling):
    try:
        found = check_rope_scaling(scaling)
        assert made(found).rope_parameters["rope_type"] == found["rope_type"]
    except ValueError as problem:
        assert "`draft_rope_scaling`" in str(problem)
