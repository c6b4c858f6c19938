"""A Hub that does not answer is named as what failed: before training where a draft is to be pushed, and at its end."""

import errno

import pytest
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tiny import random_chats, tiny_pair

from hf_eagle import EagleTrainer, EagleTrainingArguments
from hf_eagle.hub.reach import check_reachable, reaching_hub
from hf_eagle.training.run_arguments import RunArguments


SAID = "`push_to_hub`: the Hub does not answer for me/tiny .*publish the draft afterwards"


@pytest.mark.parametrize(
    "problem",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ConnectionError("the Hub refused the connection"),
        OfflineModeIsEnabled("offline"),
        TimeoutError("too slow"),
        RuntimeError("the client has been closed"),
    ],
)
def test_whatever_the_client_raises_names_the_hub(problem):
    with pytest.raises(OSError, match=SAID) as found, reaching_hub("me/tiny"):
        raise problem
    assert "room" not in str(found.value) and "\n" not in str(found.value)


def test_http_errors_too():
    from huggingface_hub.errors import HTTPError

    with pytest.raises(OSError, match=SAID), reaching_hub("me/tiny"):
        raise HTTPError("[Errno 111] Connection refused")
    assert issubclass(HfHubHTTPError, (HTTPError, OSError))


def test_a_run_that_could_not_push_is_refused_before_it_begins(tmp_path, monkeypatch):
    """Nobody listens at the discard port."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(OSError, match=SAID):
        check_reachable("me/tiny", tmp_path)
    with pytest.raises(OSError, match="the Hub does not answer for run "):
        check_reachable(None, tmp_path / "run")
    given = ["--target", "nowhere", "--train_data", "nothing", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(OSError, match=SAID):
        RunArguments.parse(
            [*given, "--hub_token", "hf_x", "--push_to_hub", "true", "--hub_model_id", "me/tiny"]
        ).refuse_before_loading()


class Pushing(EagleTrainer):
    """The Hub is there in the beginning and gone in the end."""

    def init_hf_repo(self, *args, **kwargs):
        self.hub_model_id = "me/tiny"

    def push_to_hub(self, *args, **kwargs):
        raise ConnectionError("the Hub refused the connection")


def test_a_hub_that_fails_at_the_end_is_no_full_disk(tmp_path):
    target, draft = tiny_pair()
    fields = {"max_steps": 2, "report_to": "none", "ttt_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    args = EagleTrainingArguments(str(tmp_path / "run"), push_to_hub=True, **fields)
    trainer = Pushing(model=draft, args=args, target=target, train_dataset=Dataset.from_list(random_chats(24)))
    trainer.train()
    with pytest.raises(ConnectionError, match="^the Hub refused the connection$"):
        trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").is_file()
