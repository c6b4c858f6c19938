"""The table of families of page `targets`, made by running a tiny model of each.

python tests/family_table.py
"""

import sys
from functools import lru_cache
from pathlib import Path


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import tiny_pictures
import tiny_vision
import torch
from every_model_type import EXACT, decoded, examine_built, packed, taught
from tiny_families import CONFIGS, tiny_family
from tiny_new_families import FIELDS, new_family_config, tiny_new_family

from hf_eagle import FrozenTarget
from hf_eagle.targets.architectures import FAMILIES, family_of
from hf_eagle.training.target_row import as_table, row_from_config


def changes(name: str) -> dict:
    """With few heads that choose keys, these tie at a score of zero, and the choice depends on how many there are."""
    return {"index_n_heads": 16} if "index_n_heads" in FIELDS[name] else {}


MAKERS = {
    **{name: (CONFIGS[name], lambda name=name: tiny_family(name)) for name in CONFIGS},
    **{name: (lambda n=name: new_family_config(n), lambda n=name: tiny_new_family(n, **changes(n))) for name in FIELDS},
    **{
        name: (lambda n=name: tiny_vision.CONFIGS[n](10), lambda n=name: tiny_vision.tiny_vision_model(n))
        for name in tiny_vision.CONFIGS
    },
}

# the models that are shown pictures, by the name of their text part's family if they have another
PICTURES = {**tiny_vision.CONFIGS, **tiny_pictures.CONFIGS}
OTHER_NAMES = {"mistral3": "as Mistral 3", "internvl": "as InternVL"}


def of_family(family) -> list[str]:
    """The tiny models of a family."""
    return [name for name, (config, _) in MAKERS.items() if family_of(config()) == family]


def measured(name: str) -> dict[str, str]:
    """What came of a tiny model: of each step, whether it was exact."""
    found = examine_built(name, MAKERS[name][1](), (taught, packed, decoded))
    words = {
        step: "yes" if word == EXACT else "alone" if "decode one prompt at a time" in said else "no"
        for step, (word, said) in found.items()
    }
    return {"tapped": words["taught"], "packed": words["packed"], "decoded": words["decoded"]}


@lru_cache
def _families_of_pictures() -> dict:
    return {name: family_of(config(10)) for name, config in PICTURES.items()}


def pictures_of(family) -> tuple[list[str], str]:
    """The tiny models of a family that are shown pictures, and the word of the table for them."""
    names = [name for name, found in _families_of_pictures().items() if found == family]
    return names, next((OTHER_NAMES.get(name, "yes") for name in names), "no")


def shows_pictures(name: str) -> bool:
    """Whether what is taught of a tiny model behind pictures is its own."""
    model, processor = tiny_pictures.any_model(name), tiny_pictures.any_processor(name)
    batch, target = tiny_pictures.pictured(processor, tiny_pictures.CHATS[:1]), FrozenTarget(model)
    with torch.no_grad():
        own = model(**batch).logits
    return torch.allclose(target.logits(target(**batch).last_hidden), own, atol=1e-4)


def row_of(family) -> dict[str, str]:
    """A row: of each step the worst that came of a model of the family."""
    names = of_family(family)
    every = [measured(name) for name in names]
    row = {step: max((one[step] for one in every), key=("yes", "alone", "no").index) for step in every[0]}
    pictured, word = pictures_of(family)
    pictures = word if all(map(shows_pictures, pictured)) else "no"
    return {"family": family.name, **row, "pictures": pictures, **row_from_config(MAKERS[names[0]][0]())}


if __name__ == "__main__":
    print(as_table([row_of(family) for family in FAMILIES]))
