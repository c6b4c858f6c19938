"""Records that name images and videos in every form in which people have them, and the typed parts they stand for."""

import base64
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_vision import chat, film, picture, text


A, B, FILM = picture(1), picture(2, 24, 8), film(3)
FILES = {"a.png": A, "b.png": B}
SAID, MORE = "the cat", "and two"


def img(shown):
    return {"type": "image", "image": shown}


def vid(shown):
    return {"type": "video", "video": shown}


def share(*turns):
    return [{"from": ("human", "gpt")[n % 2], "value": turn} for n, turn in enumerate(turns)]


def held(shown: Image.Image, folder) -> bytes:
    shown.save(folder / "held.png")
    return (folder / "held.png").read_bytes()


def data_address(folder) -> str:
    return "data:image/png;base64," + base64.b64encode(held(A, folder)).decode()


def frames(folder) -> list[str]:
    for n, frame in enumerate(FILM):
        Image.fromarray(frame).save(folder / f"frame{n}.png")
    return [f"frame{n}.png" for n in range(len(FILM))]


def gif(folder) -> str:
    """The film as a GIF, which keeps every pixel: no frame has more than 256 colours."""
    first, *rest = [Image.fromarray(frame).quantize(256) for frame in FILM]
    first.save(folder / "film.gif", save_all=True, append_images=rest, duration=500, disposal=2)
    return "film.gif"


ONE = chat([img(A), text("\nhello")], SAID)
TWO = chat([img(A), text("one "), img(B), text(" two")], SAID, [text("what? "), img(A)], MORE)
MIXED = chat([img(A), vid(FILM), text("hello")], SAID)
PLAIN = chat([img(A), text("hello")], SAID)
FIRST = [{"role": "system", "content": "hello"}, *PLAIN]
# form -> the typed parts that it stands for, and a record of it, whose files lie in the folder
FORMS = {
    "LLaVA": (ONE, lambda f: {"id": "1", "image": "a.png", "conversations": share("<image>\nhello", SAID)}),
    "ALLaVA, behind the text": (
        chat([text("hello\n"), img(A)], SAID),
        lambda f: {"image": "a.png", "url": "http://x/a.png", "conversations": share("hello\n<image>", SAID)},
    ),
    "LLaVA, a list": (
        TWO,
        lambda f: {
            "image": ["a.png", "b.png", "a.png"],
            "conversations": share("<image>one <image> two", SAID, "what? <image>", MORE),
        },
    ),
    "LLaMA-Factory": (
        TWO,
        lambda f: {
            "images": ["a.png", "b.png", "a.png"],
            "messages": chat("<image>one <image> two", SAID, "what? <image>", MORE),
        },
    ),
    "LLaMA-Factory, with a film": (
        MIXED,
        lambda f: {"images": ["a.png"], "videos": [frames(f)], "messages": chat("<image><video>hello", SAID)},
    ),
    "LLaMA-Factory, Alpaca": (
        ONE,
        lambda f: {"instruction": "<image>\nhello", "input": "", "output": SAID, "images": ["a.png"], "videos": []},
    ),
    "TRL": (
        TWO,
        lambda f: {
            "images": [A, B, A],
            "messages": chat(
                [{"type": "image"}, text("one "), {"type": "image"}, text(" two")],
                [text(SAID)],
                [text("what? "), {"type": "image"}],
                [text(MORE)],
            ),
        },
    ),
    "TRL, prompt and completion": (
        PLAIN,
        lambda f: {
            "prompt": [{"role": "user", "content": [{"type": "image"}, text("hello")]}],
            "completion": [{"role": "assistant", "content": [text(SAID)]}],
            "images": [A],
        },
    ),
    "TRL, preference": (PLAIN, lambda f: {"prompt": "<image>hello", "chosen": SAID, "rejected": "no", "images": [A]}),
    "keys that Arrow adds": (
        PLAIN,
        lambda f: {"messages": chat([{"type": "image", "text": None}, text("hello")], SAID), "image": A},
    ),
    "OpenAI, data": (
        PLAIN,
        lambda f: {
            "messages": chat([{"type": "image_url", "image_url": {"url": data_address(f)}}, text("hello")], SAID)
        },
    ),
    "OpenAI, a path": (
        PLAIN,
        lambda f: {"messages": chat([{"type": "image_url", "image_url": {"url": "a.png"}}, text("hello")], SAID)},
    ),
    "OpenAI, a file's address": (
        PLAIN,
        lambda f: {"messages": chat([{"type": "image_url", "image_url": (f / "a.png").as_uri()}, text("hello")], SAID)},
    ),
    "a part with a path, in ShareGPT": (
        PLAIN,
        lambda f: {"conversations": share([{"type": "image", "path": "a.png"}, text("hello")], SAID)},
    ),
    "own parts beside a column": (
        TWO,
        lambda f: {
            "images": ["b.png", A],
            "messages": chat(
                [img("a.png"), text("one "), {"type": "image"}, text(" two")], SAID, "what? <image>", MORE
            ),
        },
    ),
    "without a mark": (PLAIN, lambda f: {"image": "a.png", "conversations": share("hello", SAID)}),
    "without a mark, behind a system": (
        FIRST,
        lambda f: {"image": A, "messages": [{"role": "system", "content": "hello"}, *chat("hello", SAID)]},
    ),
    "without a mark, a column of systems": (
        FIRST,
        lambda f: {"image": A, "system": "hello", "prompt": "hello", "completion": SAID},
    ),
    "bytes, as `datasets` has them": (
        PLAIN,
        lambda f: {"image": {"bytes": held(A, f), "path": "x.png"}, "prompt": "hello", "completion": SAID},
    ),
    "a path, as `datasets` has it": (
        PLAIN,
        lambda f: {"image": {"bytes": None, "path": "a.png"}, "prompt": "hello", "completion": SAID},
    ),
    "bytes alone": (PLAIN, lambda f: {"image": held(A, f), "prompt": "hello", "completion": SAID}),
    "base64": (
        PLAIN,
        lambda f: {"image": base64.b64encode(held(A, f)).decode(), "prompt": "hello", "completion": SAID},
    ),
    "an array": (PLAIN, lambda f: {"image": np.asarray(A), "prompt": "hello", "completion": SAID}),
    "a film's frames beside each other": (
        chat([vid(FILM), text("hello")], SAID),
        lambda f: {"video": frames(f), "prompt": "<video>hello", "completion": SAID},
    ),
    "a film's pictures": (
        chat([vid(FILM), text("hello")], SAID),
        lambda f: {"videos": [[Image.fromarray(x) for x in FILM]], "prompt": "hello", "completion": SAID},
    ),
    "a film's pictures beside each other": (
        chat([vid(FILM), text("hello")], SAID),
        lambda f: {"videos": [Image.fromarray(x) for x in FILM], "prompt": "hello", "completion": SAID},
    ),
    "LLaVA-Video": (
        chat([vid(FILM), text("\nhello")], SAID),
        lambda f: {"id": "1", "video": frames(f), "conversations": share("<image>\nhello", SAID)},
    ),
    "LLaVA-Video, behind the text, beside an empty column": (
        chat([text("hello "), vid(FILM)], SAID),
        lambda f: {"image": None, "videos": [frames(f)], "conversations": share("hello <image>", SAID)},
    ),
    "a GIF in a list of films": (
        chat([vid(FILM), text("hello")], SAID),
        lambda f: {"videos": [gif(f)], "messages": chat("<video>hello", SAID)},
    ),
    "GIFs side by side": (
        chat([vid(FILM), text("hello "), vid(FILM)], SAID),
        lambda f: {"videos": [gif(f), (f / gif(f)).read_bytes()], "messages": chat("<video>hello <video>", SAID)},
    ),
    "a path of pathlib": (PLAIN, lambda f: {"image": Path("a.png"), "prompt": "hello", "completion": SAID}),
    "a part with a path of pathlib": (PLAIN, lambda f: {"messages": chat([img(f / "a.png"), text("hello")], SAID)}),
    "frames by paths of pathlib": (
        chat([vid(FILM), text("hello")], SAID),
        lambda f: {"videos": [Path(name) for name in frames(f)], "prompt": "hello", "completion": SAID},
    ),
    "a grey array": (
        chat([img(A.convert("L").convert("RGB")), text("hello")], SAID),
        lambda f: {"image": np.asarray(A.convert("L")), "prompt": "hello", "completion": SAID},
    ),
    "a film as an array": (
        chat([vid(FILM), text("hello")], SAID),
        lambda f: {"video": FILM, "prompt": "hello", "completion": SAID},
    ),
}


def save_pictures(folder):
    """The files that the records name."""
    for name, shown in FILES.items():
        shown.save(folder / name)
    return folder


IN_TABLES = ["LLaVA", "LLaVA, a list", "LLaMA-Factory", "TRL", "TRL, prompt and completion", "TRL, preference"]
IN_TABLES += ["bytes alone", "a path, as `datasets` has it", "a film's pictures beside each other", "a film's pictures"]
IN_TABLES += ["LLaVA-Video, behind the text, beside an empty column"]
IN_FILES = [(form, "chats.jsonl") for form in FORMS] + [(form, "chats.parquet") for form in IN_TABLES]
