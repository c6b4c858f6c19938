"""`scripts/evaluate_draft.py` with a false feature: EAGLE-1 is fed hidden states in FRONT of the target's final norm.

Takes the arguments of that script. The target's own logits stay right, so only the counts of the draft can tell.
"""

import runpy
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hf_eagle import FrozenTarget, LlamaForCausalLMEagle  # noqa: E402


load = FrozenTarget.from_pretrained


def load_with_the_norms_input(*args, **kwargs):
    target = load(*args, **kwargs)
    target.tap_ids = [target.num_layers]
    return target


FrozenTarget.from_pretrained = load_with_the_norms_input
LlamaForCausalLMEagle.select_features = lambda draft, features: features.taps
runpy.run_path(str(ROOT / "scripts" / "evaluate_draft.py"), run_name="__main__")
