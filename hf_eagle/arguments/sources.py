"""Arguments that every verb shares which loads a target or renders chats: said alike, read alike."""

from dataclasses import dataclass

from ..data.messages import read_tools
from ..data.reading import parse_json, read_json
from ..data.rendering import check_template_kwargs
from .parser import argument as _arg


@dataclass(kw_only=True)
class TargetSourceArguments:
    """Where the target comes from, beside its name."""

    _argument_group_name = "source of the target"

    target_revision: str = _arg("main", "Revision of the target on the Hub.")
    gguf_file: str | None = _arg(None, "Name of a GGUF file inside `target`, if it is one.")
    trust_remote_code: bool = _arg(False, "Run code that comes with the target.")

    @property
    def source(self) -> dict[str, str | bool]:
        """As the functions of `targets/loading` take it: `load_tokenizer(target, **source)`."""
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"revision": self.target_revision, "trust_remote_code": self.trust_remote_code, **gguf}


@dataclass(kw_only=True)
class TemplateArguments:
    """How chats are rendered."""

    _argument_group_name = "chat template"

    chat_template_kwargs: str | None = _arg(
        None, 'What else the chat template is given, as JSON: `{"enable_thinking": false}`. Serve with the same.'
    )
    tools: str | None = _arg(
        None, "JSON file with a list of tools, each a JSON schema: offered in every conversation that brings none."
    )

    def __post_init__(self):
        self._template_kwargs = self._read()

    @property
    def template_kwargs(self) -> dict:
        """What the chat template is given besides messages; `tools` are those of conversations that bring none."""
        return dict(self._template_kwargs)

    def _read(self) -> dict:
        found = parse_json(self.chat_template_kwargs or "{}", "`chat_template_kwargs`")
        if not isinstance(found, dict):
            raise ValueError(f"`chat_template_kwargs` must be a JSON object, got {self.chat_template_kwargs}.")
        check_template_kwargs(found, "chat_template_kwargs")
        return found if self.tools is None else found | {"tools": _tools_in(self.tools)}


def _tools_in(path: str) -> list[dict]:
    """The tools of a JSON file; `ValueError` naming it where it holds none."""
    try:
        found = read_json(path)
    except ValueError as problem:
        raise ValueError(f"`tools` cannot be read: {problem}") from None
    try:
        tools = read_tools({"tools": found}, 0)
    except ValueError as problem:
        raise ValueError(f"`tools` {path} cannot be read: {str(problem).removeprefix('Record 0: ')}") from None
    if not tools:
        raise ValueError(f"`tools` names {path}, which holds no tool: write a list of JSON schemas, or leave it out.")
    return tools
