"""`HfArgumentParser` with `--config file.yaml`: the file's values first, then the command line over them."""

import argparse
import difflib
import os
import sys
from dataclasses import field
from typing import Any

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from ..door.printer import unprinted
from ..shipped import find_config
from .bounds import bounds_of, check_numbers
from .yaml_files import read_words


def asks_for_help(args: list[str]) -> bool:
    """Whether a command line asks for its help, whatever else is in it."""
    return "--help" in args or "-h" in args


def argument(default: Any, help: str) -> Any:
    """Return a field of a dataclass of arguments, with its default and its text for `--help`."""
    return field(default=default, metadata={"help": help})


def parse_counts(name: str, text: str, most: int = 64) -> list[int]:
    """Return the numbers of `1..4` or `1,2,3,4`; raise `ValueError` naming the argument for anything else."""
    first, _, last = text.partition("..")
    parts = [part.strip() for part in ([first, last] if last else text.split(","))]
    counts = [int(part) if part.isdecimal() and len(part) < 10 else 0 for part in parts]

    if not all(1 <= count <= most for count in counts) or len(counts) > most or (last and counts[0] > counts[1]):
        raise ValueError(f"`{name}` must be numbers from 1 to {most}, as `1..8` or `1,2,4`, but is {text[:100]!r}.")
    return list(range(counts[0], counts[1] + 1)) if last else counts


def parse_lengths(name: str, text: str, or_none: bool = False) -> list[int | None]:
    """Return ascending numbers of tokens, `512,2048,8192`, the first of which may be `none` if that is allowed.

    Raises `ValueError` naming the argument for anything else.
    """
    words = [word.strip() for word in text.split(",")]
    unset = or_none and is_none(words[0])
    numbers = [int(word) if word.isdecimal() and len(word) < 10 else 0 for word in words[unset:]]

    if not all(a < b for a, b in zip([0, *numbers], numbers, strict=False)) or not words[unset:] and not unset:
        example = "none,512,1024,2048" if or_none else "512,2048,8192"
        raise ValueError(f"`{name}` must be ascending numbers of tokens, as `{example}`, but is {text[:100]!r}.")
    return [None] * unset + numbers


def is_none(word: str) -> bool:
    """Whether a word of a command line unsets what its file has set, as null does in YAML."""
    return word.lower() in ("none", "null")


def _int_or_none(word: str) -> int | None:
    return None if is_none(word) else int(word)


def _float_or_none(word: str) -> float | None:
    return None if is_none(word) else float(word)


# readers of numbers that may be unset
_OR_NONE = {int: _int_or_none, float: _float_or_none}
for _kind, _reader in _OR_NONE.items():
    _reader.__name__ = _kind.__name__  # argparse shows it in errors


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; shows one spelling of an option, bounds, and only informative defaults."""

    def _format_action_invocation(self, action):
        if len(action.option_strings) > 1 and action.option_strings[0].startswith("--"):
            option = action.option_strings[0]
            if action.nargs == "?" or action.nargs == 0:
                return option
            return f"{option} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        return super()._format_action_invocation(action)

    def _get_help_string(self, action):
        default = "" if action.default in (None, argparse.SUPPRESS) else "default: %(default)s"
        said = "; ".join(part for part in (getattr(action, "bounds", ""), default) if part)
        return f"{action.help or ''} ({said})" if said else action.help


class EagleArgumentParser(HfArgumentParser):
    """Dataclasses from a YAML file and the command line.

    The file holds one flat mapping of argument names to values. Its values pass through argparse like typed ones, so a
    wrong type, choice or name is refused before anything starts. `none` unsets a number that the file has set.

    Example:
        >>> parser = EagleArgumentParser((TargetArguments, EagleTrainingArguments))
        >>> target_args, training_args = parser.parse_args_and_config(["--config", "draft.yaml", "--ttt_steps", "5"])
    """

    def __init__(self, dataclass_types, **kwargs):
        kwargs = {
            "allow_abbrev": False,
            "formatter_class": _HelpFormatter,
            "usage": "%(prog)s [--config FILE] [--argument value ...]",
            **kwargs,
        }
        super().__init__(dataclass_types, **kwargs)

        for action in self._actions:
            if action.default is None and not action.required:
                action.type = _OR_NONE.get(action.type, action.type)
            if action.const is False:  # the library's `--no_X` has help and default of `--X`, which it turns off
                action.help, action.default = f"Turn off `--{action.dest}`.", argparse.SUPPRESS

        self.add_argument("--config", metavar="FILE", help="YAML file of arguments, or a recipe's name.")

    def parse_args_and_config(self, args: list[str] | None = None, first: str | None = None) -> tuple[Any, ...]:
        """Parse the arguments, and return one instance of each dataclass, in order.

        Args:
            args: the command line, `sys.argv[1:]` when `None`.
            first: the argument whose value may come first, without its name.

        Exits with a message for an unknown name, a value that is not allowed, or an unreadable file.
        """
        args = [_at_home(word) for word in (sys.argv[1:] if args is None else args)]
        if asks_for_help(args):  # alone: the parser of the help knows fewer arguments
            self.parse_args(["--help"])
        if first is not None and args and not args[0].startswith("-"):
            args = [f"--{first}", *args]
        for option in (arg.split("=")[0] for arg in args if arg.startswith("--")):
            if option not in self._option_string_actions:  # checked before argparse reports anything missing
                self.error(self._unknown(option))

        config = _value_of("--config", args)
        if config is not None and not config.strip():
            self.error("`--config` is empty: name a YAML file or a recipe, or leave it out.")
        try:
            from_file = [] if config is None else [_at_home(word) for word in self._tokens(config)]
            *parsed, _, unknown = self.parse_args_into_dataclasses(
                from_file + args, return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as problem:
            self.error(str(problem))

        if unknown:
            self.error(self._unknown(unknown[0].split("=")[0]))
        return tuple(parsed)

    def format_help(self) -> str:
        """Add the bounds of numbers to argparse's help; they are looked up only now, since nothing else shows them."""
        told = {name: bounds.told() for group in self.dataclass_types for name, bounds in bounds_of(group).items()}
        for action in self._actions:
            action.bounds = told.get(action.dest, "")
        return super().format_help()

    def _print_message(self, message, file=None):
        """Print help; unlike argparse, raise an error if it cannot be written, as on a full disk."""
        file = sys.stderr if file is None else file
        try:
            file.write(message)
        except BrokenPipeError:
            raise
        except OSError as problem:
            if file is sys.stdout:
                raise unprinted(problem) from problem

    def parse_known_args(self, args=None, namespace=None):
        """Check that numbers lie within their bounds, before any dataclass is made."""
        parsed, unknown = super().parse_known_args(args, namespace)
        for name in (name for name, value in vars(parsed).items() if value == [None]):
            setattr(parsed, name, None)

        for group in self.dataclass_types:
            check_numbers(group, vars(parsed))
        return parsed, unknown

    def _tokens(self, path: str) -> list[str]:
        """Return the file's values as words of a command line."""
        actions = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # the first: a later one, `--no_X`, means the opposite

        def takes(name: str) -> tuple[type, bool]:
            if name in ("config", "help"):
                raise ValueError(f"{path}: `{name}` belongs on the command line, not in a file: leave it out.")
            if name not in actions:
                raise ValueError(f"{path}: {self._unknown(f'--{name}')}")
            action = actions[name]
            kinds = {
                string_to_bool: bool,
                **{known: number for number in _OR_NONE for known in (number, _OR_NONE[number])},
            }
            kind = kinds.get(action.type, str)
            return kind, action.nargs == "+"

        words = read_words(find_config(path), "--config", takes)
        several = {name for name in words if takes(name)[1]}
        return [
            word
            for name, values in words.items()
            for word in ([f"--{name}", *values] if name in several else [f"--{name}={value}" for value in values])
        ]

    def error(self, message: str):
        """Print one sentence instead of two screens of usage."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")

    def _unknown(self, option: str) -> str:
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        return f"unknown argument {option}" + (f", did you mean {near[0]}?" if near else ".")


def _at_home(word: str) -> str:
    """Expand `~/` in a word of a command line as shells do; they leave `--name=~/x` alone, and never see YAML."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return name + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


def _value_of(option: str, args: list[str]) -> str | None:
    for place, arg in enumerate(args):
        if arg == option and place + 1 < len(args):
            return args[place + 1]
        if arg.startswith(f"{option}="):
            return arg.split("=", 1)[1]
    return None
