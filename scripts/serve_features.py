"""Start a stock vLLM that gives the features of a recipe's target, or print the command that does.

    python scripts/serve_features.py --config recipe.yaml --folder /dev/shm/features
    python scripts/serve_features.py --config recipe.yaml --folder /dev/shm/features --serving_python PYTHON
    python scripts/train_eagle.py --config recipe.yaml --target_url http://localhost:8000 \
        --features_folder /dev/shm/features

It takes the recipe and the arguments of scripts/train_eagle.py, and reads from them which layers the draft taps, how
long rows are, and the data type. Without `--serving_python` it prints the command, for the machine that serves. Only
the target's config is read here.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installation

import hf_eagle.door.beginning  # noqa: F401 - first: from here on a signal ends the script in one line
from hf_eagle.arguments.bounds import Port, check_numbers
from hf_eagle.arguments.groups import AdapterArguments, DataArguments, DraftArguments, TargetArguments
from hf_eagle.arguments.objective import parser_beside_trainer
from hf_eagle.arguments.parser import EagleArgumentParser, asks_for_help
from hf_eagle.arguments.parser import argument as _arg
from hf_eagle.data.reading import parse_json
from hf_eagle.door.inputs import check_file, check_target
from hf_eagle.door.outputs import check_output_folder
from hf_eagle.door.printer import run_verb
from hf_eagle.serving.connector.feature_port import TOKEN


@dataclass
class ServeFeaturesArguments:
    """Where the server runs, and where it writes."""

    _argument_group_name = "server of features"

    folder: str | None = _arg(
        None,
        "Folder that features are written to, on the serving machine: best in memory, as /dev/shm/features. Each file "
        "is deleted once it is fetched. Unset: `features_folder`.",
    )
    host: str = _arg("127.0.0.1", "Address that the server listens on; 0.0.0.0 for trainers on other machines.")
    port: Port = _arg(8000, "Port of the server.")
    features_port: Port | None = _arg(
        None,
        "Also hand out the files on this port, for trainers that do not see the folder and leave `features_folder` "
        "unset. Both sides need the same secret in the environment variable HF_EAGLE_FEATURES_TOKEN.",
    )
    engine_args: str = _arg(
        "{}",
        'Further arguments of vLLM, as JSON: `{"tensor_parallel_size": 8}`, or on a CPU `{"enforce_eager": true}`.',
    )
    serving_python: str | None = _arg(
        None, "Python interpreter that has vLLM: start the server with it. Unset: print the command."
    )

    def __post_init__(self):
        check_numbers(self)
        from hf_eagle.serving.features_command import check_engine_args

        self.engine_options = parse_json(self.engine_args, "`engine_args`")
        if not isinstance(self.engine_options, dict):
            raise ValueError(f"`engine_args` must be a JSON object, got {self.engine_args}.")
        check_engine_args(self.engine_options)
        if self.features_port == self.port:
            raise ValueError(f"`features_port` and `port` are both {self.port}: give two.")


def parser(for_help: bool = False) -> EagleArgumentParser:
    groups = (ServeFeaturesArguments, TargetArguments, DraftArguments, DataArguments, AdapterArguments)
    return parser_beside_trainer(groups, __doc__, for_help)


def door(argv: list[str] | None = None):
    """Return the arguments, after checking every path."""
    given = sys.argv[1:] if argv is None else argv
    parsed = parser(for_help=asks_for_help(given)).parse_args_and_config(given)
    args, target, draft, data, *_ = parsed
    args.folder = args.folder or target.features_folder
    if args.folder is None:
        raise ValueError("`folder` is not set: name the one that features are written to, with `--folder DIR`.")

    check_target("target", target.target, target.gguf_file)
    if args.serving_python is not None:
        check_file("serving_python", args.serving_python)
        if args.features_port is not None and len(os.environ.get(TOKEN, "").split()) != 1:
            raise ValueError(
                f"`features_port` is {args.features_port}, but the environment variable {TOKEN} is not set to one "
                "word: set it to the same secret here and for the training."
            )
        # whatever lies there stays: only files of the connector's own names are deleted
        check_output_folder("folder", args.folder, overwrite=True, ours=lambda folder: True)
    return args, target, draft, data


def main() -> None:
    args, target, draft, data = door()
    command = command_of(args, target, draft, data)
    if args.serving_python is None:
        print(command.shown())
        return

    Path(args.folder).mkdir(parents=True, exist_ok=True)
    print(command.shown(args.serving_python), file=sys.stderr, flush=True)
    os.execve(args.serving_python, [args.serving_python, *command.words], os.environ | command.environment)


def command_of(args: ServeFeaturesArguments, target: TargetArguments, draft: DraftArguments, data: DataArguments):
    """Return the [`FeaturesCommand`] of a recipe."""
    from hf_eagle.serving.features_command import features_command
    from hf_eagle.targets.loading import takes_media
    from hf_eagle.targets.room import config_before_loading
    from hf_eagle.training.parts import config_of_draft
    from hf_eagle.training.target_of_run import check_lengths

    if target.gguf_file is not None or takes_media(target.target, target.target_revision):
        what = "a GGUF file" if target.gguf_file is not None else "a model that takes images"
        raise ValueError(f"`target` {target.target} is {what}, which is not served for its features: name another.")

    check_lengths(target, data)
    config = config_before_loading(target.target, **target.source)
    text, taps = config.get_text_config(), config_of_draft(config, target, draft).tap_ids or ()

    dtype = target.target_dtype if target.target_dtype != "auto" else text.dtype or config.dtype or "float32"
    longest = getattr(text, "max_position_embeddings", None)
    options = {"host": args.host, "port": args.port}
    if target.target_revision != "main":
        options["revision"] = target.target_revision
    if target.trust_remote_code:
        options["trust_remote_code"] = True
    if target.target_sharding != "none" and target.target_shard_size is not None:
        options["tensor_parallel_size"] = target.target_shard_size

    return features_command(
        target.target,
        [*taps, text.num_hidden_layers],
        args.folder,
        data.max_length,
        str(dtype).removeprefix("torch."),
        beyond_config=isinstance(longest, int) and data.max_length >= longest,
        features_port=args.features_port,
        **options | args.engine_options,
    )


if __name__ == "__main__":
    run_verb(main)
