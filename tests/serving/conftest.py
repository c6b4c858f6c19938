"""What the serving tests share: prompts, the target's answers by a vLLM without a draft, drafts trained on them."""

import json

import pytest


pytest.register_assert_rewrite("harness")  # before its import: its assertions shall say what they compared

import harness  # noqa: E402
from ending import (  # noqa: E402, F401
    pytest_keyboard_interrupt,
    pytest_runtest_logstart,
    pytest_sessionfinish,
    pytest_unconfigure,
)
from transformers import AutoTokenizer  # noqa: E402

from hf_eagle.evaluation.prompts import encode_prompt, load_prompts  # noqa: E402


# two kinds of long answers and one that ends early; the last topics are never trained on
TEMPLATES = {
    "Write a short story about a {}.": (
        "dog cat bear horse fox mouse bird fish wolf lion duck frog owl bee goat deer snake whale rabbit hen".split(),
        "tiger cow sheep monkey".split(),
    ),
    "Give me five tips for somebody who wants to buy a {}.": (
        "car house book phone clock ship lamp tent guitar bed watch camera desk boat sofa piano".split(),
        "bicycle kitchen computer jacket".split(),
    ),
    "What is the capital of {}? Answer in one short sentence.": (
        "Germany Spain Japan Egypt Canada India Brazil Peru Kenya Norway Poland Greece".split(),
        "France Italy China Russia".split(),
    ),
}


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.timeout(900))  # the first test of a session also makes what all of them share


@pytest.fixture(scope="session")
def tokenizer():
    assert (harness.TARGET / "config.json").exists(), f"{harness.TARGET} is missing: run `make assets` first."
    return AutoTokenizer.from_pretrained(harness.TARGET)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


def _user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="session")
def prompts_file(shared):
    """Twelve prompts that training does not see."""
    path = shared / "unseen.jsonl"
    texts = [template.format(topic) for template, (_, unseen) in TEMPLATES.items() for topic in unseen]
    path.write_text("".join(json.dumps({"messages": _user(text)}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def answers(shared, tokenizer, prompts_file):
    """The target's own greedy answers, without a draft: chats to train on, and the unseen prompts' token ids."""
    texts = [template.format(topic) for template, (topics, _) in TEMPLATES.items() for topic in topics]
    unseen = [encode_prompt(prompt, tokenizer) for prompt in load_prompts(prompts_file)]
    seen = [_prompt_ids(tokenizer, text) for text in texts]
    token_ids = harness.serve(shared, seen + unseen, max_tokens=64, max_num_seqs=16)["token_ids"]

    data = shared / "answers.jsonl"
    with data.open("w") as file:
        for text, ids in zip(texts, token_ids[: len(texts)], strict=True):
            answer = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
            file.write(json.dumps({"messages": [*_user(text), answer]}) + "\n")
    return {"train_data": data, "prompt_token_ids": unseen, "token_ids": token_ids[len(texts) :]}


def _prompt_ids(tokenizer, text):
    rendered = tokenizer.apply_chat_template(_user(text), add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


RECIPES = harness.ROOT / "training_args"
# name -> arguments of training
DRAFTS = {
    "eagle3": {"draft_vocab_size": 512},
    "four_taps": {"draft_vocab_size": 512, "tap_ids": [1, 10, 20, 29]},
    # whose head costs ten times as much to train as all the rest: from another draft, named here, it takes a few steps
    "full_vocabulary": {"init_from": "eagle3", "max_steps": 6, "ttt_steps": 2},
    # shorter than every prompt
    "windowed": {"init_from": "eagle3", "max_steps": 12, "draft_vocab_size": 512, "draft_sliding_window": 24},
    "eagle3.1": {"draft_vocab_size": 512, "fc_norm": True, "norm_output": True},
    # its recipe; a draft of features learns more slowly than one of tokens
    "eagle1": {
        "config": RECIPES / "smollm2-135m-eagle1.yaml",
        "ttt_steps": None,
        "learning_rate": None,
        "max_steps": 72,
    },
}


@pytest.fixture(scope="session")
def measured_draft(shared, answers, prompts_file):
    """name -> (draft folder, result, tokens): trained and measured on the unseen prompts, once a session."""
    found = {}

    def get(name):
        if name not in found:
            recipe = {key: get(x)[0] if key == "init_from" else x for key, x in DRAFTS[name].items()}
            draft = harness.train(shared / name, answers["train_data"], **recipe)
            # one comparison of the script's own, prompt by prompt, is enough: the others meet the answers in vLLM
            how = {} if name == "eagle3" else {"compare_to_target": False, "batch_size": 12}
            found[name] = (draft, *harness.measure(draft, draft, prompts_file, **how))
        return found[name]

    return get
