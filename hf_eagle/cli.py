"""`hf-eagle VERB [arguments]`: the scripts of `scripts/`, from any place where hf_eagle is installed.

`python -m hf_eagle` does the same, for launchers: `torchrun --nproc-per-node 8 -m hf_eagle train --config ...`.
"""

import ast
import difflib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .shipped import recipe_names, shipped


# verb -> file in `scripts/`
VERBS = {
    "train": "train_eagle.py",
    "evaluate": "evaluate_draft.py",
    "regenerate": "regenerate_answers.py",
    "write-prompts": "write_prompts.py",
    "preview": "preview_data.py",
    "serve-features": "serve_features.py",
    "cache": "cache_features.py",
    "targets": "show_targets.py",
    "check": "check_draft.py",
    "diagnose": "diagnose_draft.py",
    "prune": "prune_draft.py",
    "import": "import_draft.py",
    "publish": "publish_draft.py",
    "compare": "compare_runs.py",
    "ablate": "ablate.py",
    "benchmark": "benchmark_training_step.py",
    "benchmark-serving": "benchmark_serving.py",
}
COMPLETION = """\
_hf_eagle() {
  local word=${COMP_WORDS[COMP_CWORD]} words=
  if [[ $COMP_CWORD == 1 ]]; then words='VERBS'
  elif [[ ${COMP_WORDS[1]} == docs ]]; then words='PAGES'
  elif [[ ${COMP_WORDS[COMP_CWORD-1]} == --config ]]; then words='RECIPES'
  elif [[ $word == -* ]]; then words=$(hf-eagle "${COMP_WORDS[1]}" --help 2>/dev/null | grep -oE -- '^ +--[a-z_0-9]+')
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _hf_eagle hf-eagle
"""


def scripts() -> dict[str, Path]:
    """The verbs whose script exists."""
    found = {verb: shipped("scripts") / name for verb, name in VERBS.items()}
    return {verb: path for verb, path in found.items() if path.is_file()}


def usage() -> str:
    """The verbs, each with the first sentence of its script; no script is run."""
    lines, width = ["usage: hf-eagle VERB [--help] [arguments]", ""], max(map(len, VERBS))
    for verb, path in scripts().items():
        described = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        lines.append(f"  {verb:<{width}}  {' '.join(described.split())}")

    lines += [f"  {'docs':<{width}}  Show a page of the documentation, or list them."]
    lines += ["", f"Recipes for `train --config NAME`: {', '.join(recipe_names())}"]
    return "\n".join([*lines, 'In bash, eval "$(hf-eagle completion)" completes verbs, arguments and recipes.'])


def completion() -> str:
    """The function that bash calls to complete the word under the cursor."""
    from .docs import PAGES

    text = COMPLETION
    for name, words in {"VERBS": [*scripts(), "docs"], "RECIPES": recipe_names(), "PAGES": PAGES}.items():
        text = text.replace(name, " ".join(words))
    return text


def run(script: Path) -> None:
    """Run a script as the main module of this process, where workers and type hints look for it."""
    spec = spec_from_file_location("__main__", script)
    sys.modules["__main__"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    """Run the verb's script as if it had been called directly."""
    from .door.printer import run_verb

    run_verb(_main)


def _main() -> None:
    verb, known = (sys.argv[1] if len(sys.argv) > 1 else "--help"), scripts()

    if verb in ("--help", "-h", "help"):
        print(usage())
    elif verb in ("--version", "-V"):
        from . import __version__

        print(f"hf_eagle {__version__}")
    elif verb == "completion":
        print(completion(), end="")
    elif verb == "docs":
        from .docs import contents, read_page

        if len(sys.argv) > 3:
            raise ValueError(f"`docs` shows one page at a time, got {', '.join(sys.argv[2:])}: name one of them.")
        page = sys.argv[2] if len(sys.argv) > 2 else "--help"
        print(contents() if page in ("--help", "-h") else read_page(page))
    elif verb in known:
        sys.argv = [f"hf-eagle {verb}", *sys.argv[2:]]
        run(known[verb])
    else:
        near = difflib.get_close_matches(verb, [*known, "docs"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(known)}."
        print(f"hf-eagle: error: unknown verb {verb}, {hint} (--help describes them)", file=sys.stderr)
        raise SystemExit(2)
