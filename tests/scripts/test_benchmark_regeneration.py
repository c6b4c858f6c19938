"""What the comparison with `LLM.chat` says before and instead of measuring; tests/serving runs a real server."""

import re
import runpy
import sys

import pytest
from forks import ROOT

from hf_eagle.serving.vllm_server import vllm_server


def test_a_server_that_does_not_come_up_says_why(tmp_path):
    """This environment has no vLLM."""
    with pytest.raises(RuntimeError, match=re.compile("did not start; its last output:.*No module named", re.DOTALL)):
        with vllm_server("target", tmp_path / "log", max_num_seqs=2, enforce_eager=True):
            pass


def test_bad_arguments(monkeypatch, capsys, tmp_path):
    script = ROOT / "scripts" / "dev" / "benchmark_regeneration.py"
    for option, message in (
        ("--rounds=0", "`rounds` must be at least 1, got 0"),
        (f"--serving_python={tmp_path}/python", "`serving_python` .* does not exist; `make test-serving` makes it"),
    ):
        monkeypatch.setattr(
            sys, "argv", [str(script), "--target=t", "--data=d", f"--serving_python={sys.executable}", option]
        )
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        assert re.search(message, capsys.readouterr().err)
