"""The table of causes: what is said of each, what to do, and which comes first."""

from dataclasses import dataclass


# causes of a lower group are told first, whatever they cost: faults that show without a trial; what keeps a sound draft
# from being used as it was trained; what it is asked; what only further training changes, of which bounds are known
FOLDER, AT_ONCE, ASKED, TRAINING = range(4)


@dataclass(frozen=True)
class Cause:
    """One cause of low acceptance.

    Attributes:
        group: `FOLDER`, `AT_ONCE`, `ASKED` or `TRAINING`.
        title: what is wrong, in a few words.
        mend: what to do, an imperative.
        least: the share of the acceptance length that must be gained for the cause to be named. It lies above what
            sound drafts show.
    """

    group: int
    title: str
    mend: str
    least: float = 0.02


_WRITE = "write the repaired draft with `--repaired FOLDER`"
_CONFIG = f"{_WRITE}, and correct what wrote its config.json"

CAUSES = {
    "folder": Cause(FOLDER, "the folder is not read as it was trained", "`hf-eagle check` with `--fix` mends it"),
    "lost_norms": Cause(
        FOLDER, "a norm's weights were lost", "restore this tensor from the checkpoint: what it held is not known"
    ),
    "tap_ids": Cause(AT_ONCE, "other layers are tapped than in training", _CONFIG),
    "tap_order": Cause(AT_ONCE, "the taps are put together in another order", _WRITE),
    "rope_base": Cause(AT_ONCE, "the RoPE base is not that of training", _CONFIG),
    "rope_scaling": Cause(AT_ONCE, "the RoPE scaling is not that of training", _CONFIG),
    "norms": Cause(AT_ONCE, "two norms are exchanged", _WRITE),
    "norm_output": Cause(AT_ONCE, "another hidden state is fed back than in training (`norm_output`)", _CONFIG),
    "fc_norm": Cause(AT_ONCE, "the norms before `fc` are not those of training (`fc_norm`)", _CONFIG),
    "fc_halves": Cause(AT_ONCE, "`fc` takes embedding and feature in the other order", _WRITE),
    "head_rows": Cause(AT_ONCE, "the rows of the head are of other tokens than `d2t` says", _WRITE),
    "dtype": Cause(AT_ONCE, "the draft loses by this dtype", "run it in float32, or train it in the served dtype"),
    "target": Cause(
        AT_ONCE,
        "the draft was trained for another target",
        "serve it with that target, or train it further on this one",
    ),
    "template": Cause(
        AT_ONCE, "the chat template gets other options than in training", "give the server those of training"
    ),
    "system_prompt": Cause(
        AT_ONCE, "training never saw this system prompt", "send the one of training, or train with this one"
    ),
    "server": Cause(
        AT_ONCE, "the server accepts less than the same draft here", "start the server with what the evidence names"
    ),
    "measured_before": Cause(
        ASKED,
        "less is accepted than the draft's folder says",
        "compare the target, its revision and the draft's files with those of that measurement",
    ),
    "sampling": Cause(
        ASKED, "sampling accepts less than greedy decoding", "lower the temperature, or draft fewer tokens", 0.05
    ),
    "context": Cause(
        ASKED,
        "contexts are longer than in training",
        "train with a larger `--max_length`, or with `--draft_sliding_window`",
        0.05,
    ),
    "answers": Cause(
        ASKED,
        "the draft was trained on answers that are not the target's own",
        "let the target answer: `hf-eagle regenerate`, and train on that",
    ),
    "domain": Cause(ASKED, "training saw no such prompts", "add prompts of this kind to the training data", 0.15),
    "overfit": Cause(ASKED, "the draft knows its training data by heart", "train on more data, in fewer epochs", 0.15),
    "vocabulary": Cause(
        TRAINING,
        "the draft vocabulary lacks tokens that are said",
        "train with a larger `--draft_vocab_size`, chosen from data like these",
        0.05,
    ),
    "ttt_steps": Cause(
        TRAINING,
        "the draft cannot go on from its own tokens",
        "train with more `--ttt_steps`, at least as many as are drafted",
        0.1,
    ),
}


def cause_of(name: str) -> Cause:
    """The row of a cause; one without a row is of a kind of draft from elsewhere, and is told by its name."""
    return CAUSES.get(name) or Cause(AT_ONCE, name, _WRITE)
