"""Arguments shared by all verbs that load a target or render chats."""

from dataclasses import dataclass

from ..data.messages import read_tools
from ..data.reading import parse_json, read_json
from ..data.rendering import check_template_kwargs
from .bounds import Count, Positive
from .parser import argument as _arg


# how much of a medium is shown
MEDIA_LIMITS = ("min_pixels", "max_pixels", "fps", "max_frames")
# one declaration for every verb that reads records
MEDIA_ROOT = "Folder that relative paths of images and videos start from. Unset: that of the file that names them."


@dataclass(kw_only=True)
class TargetSourceArguments:
    """Where the target comes from, besides its name."""

    _argument_group_name = "source of the target"

    target_revision: str = _arg("main", "Revision of the target on the Hub.")
    gguf_file: str | None = _arg(None, "Name of the GGUF file in the folder `target`, if the target has that format.")
    trust_remote_code: bool = _arg(False, "Run code that comes with the target.")

    @property
    def source(self) -> dict[str, str | bool]:
        """Return this as arguments of the functions in `targets/loading`: `load_tokenizer(target, **source)`."""
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"revision": self.target_revision, "trust_remote_code": self.trust_remote_code, **gguf}


@dataclass(kw_only=True)
class TemplateArguments:
    """How chats are rendered."""

    _argument_group_name = "chat template"

    chat_template_kwargs: str | None = _arg(
        None, 'Further arguments of the chat template, as JSON: `{"enable_thinking": false}`. Serve with the same ones.'
    )
    tools: str | None = _arg(
        None, "JSON file with a list of tools, each a JSON schema: offered in every conversation that brings none."
    )

    def __post_init__(self):
        self._template_kwargs = self._read()

    @property
    def template_kwargs(self) -> dict:
        """Return the chat template's arguments besides messages; `tools` are for conversations that bring none."""
        return dict(self._template_kwargs)

    def _read(self) -> dict:
        found = parse_json(self.chat_template_kwargs or "{}", "`chat_template_kwargs`")
        if not isinstance(found, dict):
            raise ValueError(f"`chat_template_kwargs` must be a JSON object, got {self.chat_template_kwargs}.")

        check_template_kwargs(found, "chat_template_kwargs")
        return found if self.tools is None else found | {"tools": _tools_in(self.tools)}


@dataclass(kw_only=True)
class MediaArguments:
    """Where images and videos are, and how many pixels and frames of them the target sees."""

    _argument_group_name = "images and videos"

    media_root: str | None = _arg(None, MEDIA_ROOT)
    min_pixels: Count | None = _arg(
        None,
        "Fewest pixels of an image, and of a video as the target's processor counts them. Unset: the processor's own.",
    )
    max_pixels: Count | None = _arg(None, "Most pixels, counted the same way. Set the same in the server.")
    fps: Positive | None = _arg(
        None,
        "Frames per second sampled from a video; for a list of frames, its frame rate. Unset: the processor's own.",
    )
    max_frames: Count | None = _arg(None, "Most frames sampled from a video. Unset: the processor's own.")

    @property
    def media_limits(self) -> dict[str, float]:
        """Return the limits that were set, as `limit_media` takes them."""
        named = {name: getattr(self, name) for name in MEDIA_LIMITS}
        return {name: value for name, value in named.items() if value is not None}


def _tools_in(path: str) -> list[dict]:
    """Return the tools in a JSON file; raise `ValueError` naming it if it holds none."""
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
