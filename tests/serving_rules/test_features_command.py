"""The command of a server of features follows from the recipe, and is a shell's and vLLM's."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_llama
from tiny_vision import tiny_vision_model
from warm_python import ROOT, warm_python

from hf_eagle.serving.connector.feature_port import TOKEN
from hf_eagle.serving.features_command import CONNECTOR, features_command


sys.path.insert(0, str(ROOT / "scripts"))

import serve_features  # noqa: E402


# a python that says how it was started
SHOWS = """
print(json.dumps({"argv": sys.argv[1:], "path": os.environ["PYTHONPATH"], "folder": os.path.isdir("features")}))
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe of a target with 8 layers, whose data are not here."""
    tiny_llama().save_pretrained(tmp_path / "target")

    def written(**changed):
        values = {"target": str(tmp_path / "target"), "train_data": ["elsewhere.jsonl"], "max_length": 100} | changed
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return ["--config", str(tmp_path / "recipe.yaml"), "--folder", str(tmp_path / "features")]

    return written


def command_of(argv):
    return serve_features.command_of(*serve_features.door(argv))


def options_of(command):
    """The options of a command as a shell splits it, by name; flags are `True`."""
    words = shlex.split(command.shown().replace("\\\n", " "))
    environment = dict(word.split("=", 1) for word in words[: words.index("python")])
    found, words = {}, words[words.index("python") + 3 :]
    for place, word in enumerate(words):
        if word.startswith("--"):
            value = words[place + 1] if place + 1 < len(words) else "--"
            found[word[2:]] = True if value.startswith("--") else value
    return environment, found


RECIPES = {
    "eagle3": ({}, [2, 4, 5, 8]),
    "own taps": ({"tap_ids": [1, 6, 7]}, [1, 6, 7, 8]),
    "the last state": ({"tap_ids": [3, 5, 8]}, [3, 5, 8]),
    "eagle1": ({"method": "eagle1"}, [8]),
    "dflash": ({"method": "dflash", "mask_token_id": 1, "draft_num_layers": 1}, [2, 4, 6, 8]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_layers_are_the_taps_and_what_enters_the_final_norm(recipe, name):
    values, layers = RECIPES[name]
    _, options = options_of(command_of(recipe(**values)))
    speculative = json.loads(options["speculative-config"])
    assert speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == layers
    assert speculative["method"] == "extract_hidden_states" and speculative["num_speculative_tokens"] == 1


def test_the_rest_follows_from_recipe_and_arguments(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/mine")
    words = [
        "--engine_args",
        '{"tensor_parallel_size": 8, "enforce_eager": true}',
        "--port",
        "9000",
        "--host",
        "0.0.0.0",
    ]
    environment, options = options_of(command_of([*recipe(target_dtype="bfloat16"), *words]))
    assert environment == {"PYTHONPATH": f"{CONNECTOR}:/mine"}
    # nothing else comes to the server's path
    assert {path.name for path in CONNECTOR.glob("*.py")} == {"__init__.py", "feature_connector.py", "feature_port.py"}
    wanted = {
        **{"model": str(tmp_path / "target"), "dtype": "bfloat16", "max-model-len": "101", "port": "9000"},
        **{"host": "0.0.0.0", "tensor-parallel-size": "8", "enforce-eager": True},
    }
    assert {name: options[name] for name in wanted} == wanted
    transfer = json.loads(options["kv-transfer-config"])
    assert transfer["kv_connector_extra_config"] == {"folder": str(tmp_path / "features")}
    assert options.keys() == wanted.keys() | {"speculative-config", "kv-transfer-config"}


def test_what_the_recipe_leaves_open_is_the_checkpoints(recipe):
    environment, options = options_of(command_of(recipe()))
    assert options["dtype"] == "float32" and options["host"] == "127.0.0.1" and options["port"] == "8000"
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in environment


@pytest.mark.parametrize(("longest", "beyond"), [(511, False), (512, True)])
def test_rows_as_long_as_the_target_reads_leave_room_for_an_answer(recipe, longest, beyond):
    environment, options = options_of(command_of(recipe(max_length=longest)))
    assert options["max-model-len"] == str(longest + 1)
    assert ("VLLM_ALLOW_LONG_MAX_MODEL_LEN" in environment) == beyond


def test_a_recipe_that_shards_its_target_says_over_how_many(recipe):
    _, options = options_of(command_of(recipe(target_sharding="tensor", target_shard_size=4)))
    assert options["tensor-parallel-size"] == "4"


@pytest.mark.parametrize("text", ["it's", "a b", "$HOME", "`x`", '"', "\\"])
def test_names_survive_a_shell(text):
    command = features_command(text, [1], f"/tmp/{text}", 8, "float32")
    script = command.shown(f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' ")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert tuple(json.loads(done.stdout)) == command.words


def test_a_port_for_features_is_the_connectors(recipe, tmp_path):
    words = ["--features_port", "9001", "--host", "0.0.0.0"]
    _, options = options_of(command_of([*recipe(), *words]))
    connector = json.loads(options["kv-transfer-config"])["kv_connector_extra_config"]
    assert connector == {"folder": str(tmp_path / "features"), "port": 9001, "host": "0.0.0.0"}
    assert options["port"] == "8000"


def test_a_port_for_features_needs_a_secret(recipe, monkeypatch):
    words = [*recipe(), "--features_port", "9001", "--serving_python", sys.executable]
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(
        ValueError, match=f"`features_port` is 9001, but the environment variable {TOKEN} is not set to one"
    ):
        serve_features.door(words)
    monkeypatch.setenv(TOKEN, "a-secret-of-mine")
    assert "a-secret-of-mine" not in command_of(words).shown()


REFUSED = [
    (["--features_port", "8000"], "`features_port` and `port` are both 8000"),
    (["--engine_args", "{"], "`engine_args`"),
    (["--engine_args", "[]"], "`engine_args` must be a JSON object"),
    (["--engine_args", '{"max-model-len": 9}'], "`engine_args` holds `max-model-len`, which follows from the recipe"),
    (["--engine_args", '{"kv_transfer_config": {}}'], "`engine_args` holds `kv_transfer_config`"),
    (["--port", "70000"], "`port` must be"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_cannot_be_served_is_refused(recipe, words, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as problem:
        command_of([*recipe(), *words])
    assert message in (capsys.readouterr().err or str(problem.value))


def test_a_folder_must_be_named(recipe):
    with pytest.raises(ValueError, match="`folder` is not set"):
        serve_features.door(recipe()[:2])


def test_a_target_that_takes_images_is_refused(recipe, tmp_path):
    tiny_vision_model().save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="is a model that takes images, which is not served for its features"):
        command_of(recipe(target=str(tmp_path / "vision")))


def test_the_server_takes_the_place_of_the_script(recipe, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport json, os, sys\n" + SHOWS)
    python.chmod(0o755)
    done = warm_python().run(
        str(ROOT / "scripts" / "serve_features.py"), *recipe(), "--serving_python", str(python), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["argv"][:2] == ["-m", "vllm.entrypoints.openai.api_server"] and shown["folder"]
    assert shown["path"].split(":")[0] == str(CONNECTOR)


def test_the_connector_is_where_the_command_says():
    assert Path(CONNECTOR, "feature_connector.py").is_file()
