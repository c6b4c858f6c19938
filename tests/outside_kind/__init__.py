"""A kind of draft from outside of hf_eagle: a small block draft in the spirit of DFlash, which proposes in one forward.

It is an example to copy, and a test: whatever of hf_eagle trains, saves, decodes or describes a draft has to work with
it as it is. `hf_eagle/docs/add_a_draft.md` walks through it.
"""

from hf_eagle.drafts.kinds import Kind
from hf_eagle.targets.latent import LATENT_SIZES


KIND = Kind(
    name="block",
    title="Block",
    package=__name__,
    architectures={"OutsideBlockDraft": "modeling"},
    methods={"block": "chain"},
    # a block is no unroll, and these shape an EAGLE draft
    meaningless=(
        *("draft_attention", "draft_attn_implementation", "draft_rope", "image_embeddings", "fc_norm", "norm_output"),
        *LATENT_SIZES,
        *("ttt_steps", "supervision", "regression_weight", "ce_weight", "feature_noise"),
    ),
)
