"""Every causal model type of transformers, built tiny: taught, packed, padded, decoded and trained, or refused?

    python tests/every_model_type.py [TYPE ...]

Prints a line for each type and counts at the end. The exit status is 1 if any type differs or ends in a traceback.
"""

import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
from datasets import Dataset
from oracle_draft import OracleDraft
from tiny import random_chats
from tiny_model_types import tiny_config, tiny_model_type
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from hf_eagle import EagleTrainer, EagleTrainingArguments, FrozenTarget, load_draft
from hf_eagle.decoding import speculative_generate
from hf_eagle.drafts.build import new_draft
from hf_eagle.drafts.eagle3.configuration import draft_config


TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TAPS, NEW = [0, 2, 3], 10
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 9 + [2] * 5 + [-1] * 3, [-1] * 2 + [0] * 1 + [1] * 17 + [2] * 10])
IDS = torch.randint(3, 96, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))
MOST = 20_000_000  # parameters
PROMPTS = [IDS[0, :7].tolist(), IDS[1, :3].tolist()]
EXACT, REFUSED, NOT_BUILDABLE, WRONG = "exact", "refused", "not buildable", "WRONG"


def build(name: str):
    """A tiny target in float64, where no rounding is amplified; in float32 if its code takes no other."""
    with torch.device("meta"):
        count = sum(x.numel() for x in AutoModelForCausalLM.from_config(tiny_config(name)).parameters())
    if count > MOST:
        raise ValueError(f"With these sizes it has {count} parameters, since its config names some of its own.")

    model = tiny_model_type(name)
    with torch.no_grad():
        model(input_ids=IDS[:1, :3], use_cache=False)
    try:
        exact = tiny_model_type(name).double()
        exact.set_experts_implementation("eager")
        mask = (torch.arange(9) > 2).long()[None]
        with torch.no_grad():  # some round to float32 inside, where the mask's lowest number is infinite
            finite = exact(input_ids=IDS[:1, :9], attention_mask=mask, use_cache=False).logits.isfinite().all()
        return exact if finite else model
    except Exception:
        return model


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def taught(target, model) -> None:
    """The distribution that a draft learns is the model's own."""
    with torch.no_grad():
        own = model(input_ids=IDS[:1, :14], use_cache=False).logits
    close(target.distribution(target(IDS[:1, :14]).last_hidden[0], None).probs, own[0].float().softmax(-1))


def packed(target, model) -> None:
    """Features of packed documents are those of each alone, and so are its logits by the model itself."""
    features = target(IDS, documents=DOCUMENTS)
    for row, documents in enumerate(DOCUMENTS):
        for document in range(3):
            as_alone(target, model, features, row, (documents == document).nonzero()[:, 0], IDS)


def padded(target, model) -> None:
    """The same of rows that are padded on either side."""
    for padding in (slice(0, 5), slice(9, None)):
        mask = torch.ones(2, 14, dtype=torch.long)
        mask[1, padding] = 0
        features = target(IDS[:, :14], mask)
        for row in range(2):
            as_alone(target, model, features, row, mask[row].nonzero()[:, 0], IDS[:, :14])


def as_alone(target, model, features, row: int, places: torch.Tensor, ids: torch.Tensor) -> None:
    alone = target(ids[row, places][None])
    close(features.last_hidden[row, places], alone.last_hidden[0])
    close(features.taps[row, places], alone.taps[0])
    with torch.no_grad():
        own = model(input_ids=ids[row, places][None], use_cache=False).logits[0]
    close(target.logits(features.last_hidden[row, places]).softmax(-1), own.softmax(-1))


def decoded(target, model) -> None:
    """Speculative decoding gives the model's own greedy answers, one prompt at a time and both together."""
    full = [greedy(model, prompt) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, full, strict=True):
        out = speculative_generate(
            target, OracleDraft(target, [answer]), torch.tensor([prompt]), max_new_tokens=NEW, num_speculative_tokens=3
        )
        assert out.answers[0] == answer[len(prompt) :], "another answer"

    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[5] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    out = speculative_generate(
        target, OracleDraft(target, full), ids, mask, max_new_tokens=NEW, num_speculative_tokens=3
    )
    assert out.answers == [a[len(p) :] for p, a in zip(PROMPTS, full, strict=True)], "another answer in a batch"


def greedy(model, prompt: list[int]) -> list[int]:
    """By a forward over all tokens for each, without a cache."""
    ids = torch.tensor([prompt])
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


def trained(target, model) -> None:
    """A draft trains for three steps, is saved, and is loaded."""
    target = FrozenTarget(tiny_model_type(model.config.model_type), TAPS)
    draft = new_draft(
        draft_config(target.config, tap_ids=TAPS), target.embedding_weight(), head_weight=target.head_weight()
    )
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        args = EagleTrainingArguments(
            output_dir=folder, max_steps=3, ttt_steps=2, report_to="none", disable_tqdm=True, save_strategy="no"
        )
        data = Dataset.from_list(random_chats(6, seed=5))
        trainer = EagleTrainer(model=draft, args=args, target=target, train_dataset=data)
        trainer.train()
        trainer.save_model()
        again = load_draft(folder, target)
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in draft.state_dict().items()), "other weights"


STEPS: tuple[Callable, ...] = (taught, packed, padded, decoded, trained)


def examine(name: str, steps: tuple[Callable, ...] = STEPS) -> dict[str, tuple[str, str]]:
    """What came of each step: a word, and the sentence of the refusal or the error."""
    try:
        model = build(name)
    except Exception as error:
        return {step.__name__: (NOT_BUILDABLE, _line(error)) for step in steps}
    return examine_built(name, model, steps)


def examine_built(name: str, model, steps: tuple[Callable, ...]) -> dict[str, tuple[str, str]]:
    """The same of a model that is there already."""
    try:
        target = FrozenTarget(model, TAPS)
        target(IDS[:1, :5])
    except Exception as error:
        return {step.__name__: _refusal(name, model, error) for step in steps}

    found = {}
    for step in steps:
        try:
            step(target, model)
            found[step.__name__] = (EXACT, "")
        except AssertionError as error:
            found[step.__name__] = (WRONG, _line(error))
        except Exception as error:
            found[step.__name__] = _refusal(name, model, error)
    return found


def _refusal(name: str, model, error: Exception) -> tuple[str, str]:
    """A refusal is one sentence that names the type or the class."""
    said = str(error)
    names = (name, type(model).__name__.removesuffix("ForCausalLM"), type(model.config).__name__)
    refused = type(error) is ValueError and "\n" not in said and said.endswith(".") and any(n in said for n in names)
    return (REFUSED if refused else WRONG), f"{'' if refused else type(error).__name__ + ': '}{_line(error)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main(names: list[str]) -> int:
    logging.disable(logging.WARNING)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    counts = {step.__name__: Counter() for step in STEPS}
    for name in names:
        found = examine(name)
        for step, (word, _) in found.items():
            counts[step][word] += 1
        words = {word for word, _ in found.values()}
        print(f"{name:28}", *words if len(words) == 1 else [f"{step} {word}," for step, (word, _) in found.items()])
        for said in dict.fromkeys(said for _, said in found.values() if said):
            print(f"    {said}")
        sys.stdout.flush()

    print(f"\n{len(names)} model types")
    for step, words in counts.items():
        print(f"{step:10}", ", ".join(f"{words[word]} {word}" for word in (EXACT, REFUSED, NOT_BUILDABLE, WRONG)))
    return int(any(words[WRONG] for words in counts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or TYPES))
