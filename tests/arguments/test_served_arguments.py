"""Where a target is served: arguments that do not fit each other are one sentence."""

import pytest

from hf_eagle.arguments.groups import TargetArguments
from hf_eagle.door.sentences import is_sentence


SERVED = {"target": "t", "target_url": ["http://localhost:8000"], "features_folder": "/dev/shm/features"}
REFUSED = [
    ({"target_url": None}, "`features_folder` is /dev/shm/features, but `target_url` names no server"),
    ({"target_url": None, "features_folder": None, "server_model": "a"}, "`server_model` is a, but `target_url` names"),
    ({"target_url": ["localhost"]}, "`target_url` must look like http://localhost:8000, got 'localhost'"),
    ({"target_url": ["http://a", "http://a"]}, "`target_url` names a server twice"),
    ({"target_sharding": "fsdp2"}, "`target_sharding` is fsdp2, but the layers of the target run in the server"),
    ({"target_shard_size": 2}, "`target_shard_size` is 2, but the layers"),
    ({"target_cpu_offload": True}, "`target_cpu_offload` is True, but the layers"),
    ({"compile_target": True}, "`compile_target` is True, but the layers"),
    ({"tap_method": "output_hidden_states"}, "`tap_method` is output_hidden_states, but the layers"),
    ({"attn_implementation": "eager"}, "`attn_implementation` is eager, but the layers"),
    ({"gguf_file": "a.gguf"}, "`gguf_file` is a.gguf, but the layers"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError) as problem:
        TargetArguments(**SERVED | changed)
    assert message in str(problem.value) and is_sentence(problem.value)


def test_a_password_is_not_repeated():
    with pytest.raises(ValueError) as problem:
        TargetArguments(**SERVED | {"target_url": ["http://me:secret@host:99999"]})
    assert "secret" not in str(problem.value)


def test_what_fits_is_taken():
    several = ["http://a:1", "https://b/v1"]
    args = TargetArguments(**SERVED | {"target_url": several, "server_model": "m", "tap_ids": [2, 4]})
    assert args.server == {"urls": several, "features_folder": "/dev/shm/features", "server_model": "m"}
