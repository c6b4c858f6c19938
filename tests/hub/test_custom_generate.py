"""What a published draft carries for plain transformers; test_publish.py has someone use it without hf_eagle."""

import ast
import importlib
import sys
import types
from functools import cache

import pytest
import torch
from chain_models import make_draft, make_target, random_prompts
from tiny_mla import SIZES
from tiny_vision import tiny_vision_model
from transformers import TextStreamer
from transformers.dynamic_module_utils import get_imports

from hf_eagle import Eagle1Config, FrozenTarget
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import EagleConfig
from hf_eagle.drafts.eagle3.configuration_latent import EagleMLAConfig
from hf_eagle.drafts.kinds import KINDS, architectures_of, class_of
from hf_eagle.hub import generate_entry
from hf_eagle.hub.custom_generate import FOLDER, PACKAGE, bundle


ARCHITECTURES = [
    name for kind in KINDS.values() if kind.package.startswith(PACKAGE.name) for name in kind.architectures
]
# 40 of the lines decode with a window, and tell what each round accepted; 400 decode with recurrent layers
MOST_FILES, MOST_LINES = 15, 2800
METHODS = (types.FunctionType, classmethod, staticmethod, property)
# methods of carried classes that torch or transformers would call to train or to save a draft, which stay at home
AT_HOME = {
    *("UnrolledDraft.forward", "_DownOfSwiGLU.backward", "_RMSNorm.backward", "Rotation.backward"),
    *("EaglePreTrainedModel._can_set_attn_implementation", "EaglePreTrainedModel.set_input_embeddings"),
    *("EaglePreTrainedModel.save_pretrained", "EagleConfig.to_diff_dict", "EagleMLAConfig.to_diff_dict"),
    *("Eagle1Config.to_diff_dict", "DFlashConfig.to_diff_dict", "DFlashDraftModel.forward"),
}


def put_beside(draft):
    """Write a draft's `custom_generate/`, as publishing does in its repository."""
    (draft / FOLDER).mkdir()
    for name, source in bundle(architectures=architectures_of(draft)).items():
        (draft / FOLDER / name).write_text(source)


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3])


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    target, draft = pair
    target.model.save_pretrained(folder / "target")
    draft.save_pretrained(folder / "draft")
    put_beside(folder / "draft")
    return folder / "target", folder / "draft"


def test_the_files_hold_everything_that_they_import():
    files = bundle("you/your-draft")
    assert "\nDRAFT = 'you/your-draft'\n" in files["generate.py"]
    assert "\nDRAFT = None\n" in bundle()["generate.py"]
    for name, source in files.items():
        for line in source.splitlines():
            assert not line.strip().startswith(("from hf_eagle", "import hf_eagle")), (name, line)
            if line.strip().startswith("from ."):
                assert f"{line.split()[1].removeprefix('.')}.py" in files, (name, line)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_draft_carries_little_and_only_its_own_kind(architecture):
    files = bundle("you/your-draft", [architecture])
    assert len(files) <= MOST_FILES
    assert sum(source.count("\n") for source in files.values()) <= MOST_LINES
    assert [name for name in ARCHITECTURES if f"class {name}(" in files["drafts.py"]] == [architecture]
    for name, source in files.items():
        assert source.startswith("# Parts of hf_eagle, copied when this draft was published; the source is there: ")
        compile(source, name, "exec")


def test_what_libraries_call_to_decode_is_carried():
    """A method that overrides one of torch's or transformers' is carried, or known to train or to save a draft."""
    classes = [class_of([name]) for name in ARCHITECTURES]
    known = {x.__name__: x for module in list(sys.modules.values()) for x in _classes_of(module)}
    assert classes and all(known[name.__name__] is name for name in classes)

    left = set()
    for tree in map(ast.parse, bundle().values()):
        for node in (x for x in tree.body if isinstance(x, ast.ClassDef)):
            carried = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
            whole = known[node.name]
            outside = {name for x in whole.__mro__ if not x.__module__.startswith("hf_eagle") for name in vars(x)}
            own = {name for name, x in vars(whole).items() if isinstance(x, METHODS) and not name.startswith("__")}
            left |= {f"{node.name}.{name}" for name in own & outside - carried}
    assert left == AT_HOME


def _classes_of(module):
    ours = getattr(module, "__name__", "").startswith("hf_eagle.")
    return [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__] if ours else []


# ---- the carried files do what the package does ----


@cache
def _draft_of(case):
    """A target's model and a draft for it."""
    if case == "m-RoPE":
        target = FrozenTarget(tiny_vision_model("qwen2.5-vl"))
        taps = [1, 2, 3]
        config = EagleConfig.from_target(target.model.config, tap_ids=taps, rope="mrope")
        return target.model, new_draft(config, target.embedding_weight(), head_weight=target.head_weight())
    target = make_target()
    if case == "LlamaForCausalLMEagle":
        draft = new_draft(Eagle1Config.from_target(target.config), target.embedding_weight())
        draft.attach(target)
        return target.model, draft
    latent = case == "Eagle3DeepseekV2ForCausalLM"
    kind = {"config_class": EagleMLAConfig, **SIZES} if latent else {"fc_norm": True, "norm_output": True}
    return target.model, make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3], **kind)


WAYS = {
    "chain": {},
    "chain of 5": {"num_speculative_tokens": 5},
    "tree": {"method": "tree", "depth": 3, "tree_top_k": 2, "total_tokens": 8},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "sampled tree": {"method": "tree", "do_sample": True, "top_k": 20},
}


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "m-RoPE"])
def carried(request, tmp_path_factory):
    """A target's model, a draft's folder, and `generate` of the files in it."""
    folder, (model, draft) = tmp_path_factory.mktemp("carried"), _draft_of(request.param)
    draft.save_pretrained(folder)
    put_beside(folder)
    package = types.ModuleType(f"carried_{folder.name}")
    package.__path__ = [str(folder / FOLDER)]
    sys.modules[package.__name__] = package
    yield model, folder, importlib.import_module(f"{package.__name__}.generate").generate
    for name in [name for name in sys.modules if name.startswith(package.__name__)]:
        del sys.modules[name]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["one prompt", "a padded batch"])
def test_the_carried_files_decode_as_the_package_does(carried, way, padded):
    """The same tokens, by the same number of the target's forwards."""
    model, folder, of_files = carried
    prompts = random_prompts(3 if padded else 1, 6, seed=4)
    mask = torch.ones_like(prompts)
    if padded:
        mask[1, :2] = 0
    found, forwards = [], []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_hook(lambda *_: forwards.append(1))
    for generate in (of_files, generate_entry.generate):
        generate(model, prompts, attention_mask=mask, draft=str(folder), max_new_tokens=1)  # what is done once
        forwards.clear()
        torch.manual_seed(5)
        answers = generate(model, prompts, attention_mask=mask, draft=str(folder), max_new_tokens=14, **WAYS[way])
        found.append((answers.tolist(), len(forwards)))
    handle.remove()
    assert found[0] == found[1]
    if "do_sample" not in WAYS[way]:
        plain = model.generate(prompts, attention_mask=mask, max_new_tokens=14, do_sample=False, pad_token_id=0)
        assert found[0][0] == plain.tolist()


# ---- the package's own function, which they are made from ----


def run(pair, folders, prompts=None, **arguments):
    prompts = random_prompts(1, 5, seed=3) if prompts is None else prompts
    return generate_entry.generate(pair[0].model, prompts, draft=str(folders[1]), **arguments)


def test_plain_transformers_needs_nothing_else(folders):
    """By transformers' own list of what a file imports, without which it refuses to load it."""
    needed = set()
    for path in (folders[1] / FOLDER).iterdir():
        needed |= set(get_imports(path))
    assert needed - sys.stdlib_module_names == {"torch", "transformers"}


def test_what_generate_defaults_to_and_where_an_answer_ends(pair, folders):
    model, prompts = pair[0].model, random_prompts(2, 5, seed=3)
    mask = torch.ones_like(prompts)
    for arguments in ({}, {"max_length": 17}, {"max_new_tokens": 30, "eos_token_id": [7, 11], "pad_token_id": 0}):
        wanted = model.generate(prompts, attention_mask=mask, **arguments)
        assert torch.equal(run(pair, folders, prompts, **arguments), wanted)


def test_sampling_takes_its_arguments_from_the_generation_config(pair, folders):
    """With a nucleus that holds one token, drawing is greedy; without, it is not."""
    greedy = run(pair, folders, max_new_tokens=16)
    torch.manual_seed(0)
    assert torch.equal(run(pair, folders, max_new_tokens=16, do_sample=True, top_k=1), greedy)
    assert not torch.equal(run(pair, folders, max_new_tokens=16, do_sample=True, temperature=3.0), greedy)


def test_the_model_is_left_as_it_was(pair, folders):
    model = pair[0].model
    model.train()
    model.lm_head.weight.requires_grad_(True)
    run(pair, folders, max_new_tokens=4)
    assert model.training and model.lm_head.weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad
    model.eval().requires_grad_(False)


def test_tokens_are_streamed(pair, folders):
    class Collect(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    streamer = Collect()
    wanted = run(pair, folders, max_new_tokens=9, streamer=streamer)
    assert streamer.seen == [*wanted[0].tolist(), "end"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 4}, "`num_beams` is not supported with a draft"),
        ({"repetition_penalty": 1.3}, "`repetition_penalty` is not supported"),
        ({"pixel_values": torch.zeros(1)}, "`pixel_values` is not supported"),
        ({"max_length": 4}, "`max_length` is 4, but the prompt has 5 tokens"),
    ],
)
def test_what_would_change_the_tokens_is_refused(pair, folders, arguments, words):
    with pytest.raises(ValueError, match=words):
        run(pair, folders, **arguments)


def test_another_kind_of_model_is_no_draft(pair, folders):
    with pytest.raises(ValueError, match="target is not a draft that can be used here: `architectures` in its config"):
        run(pair, (folders[0], folders[0]))


def test_a_draft_must_be_named(pair):
    with pytest.raises(ValueError, match="`draft` is missing: pass the folder"):
        generate_entry.generate(pair[0].model, random_prompts(1, 5, seed=3), max_new_tokens=4)
