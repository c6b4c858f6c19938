"""What a name means on this machine."""

from pathlib import Path

import pytest

from hf_eagle.door.names import as_named, at_home, check_branch
from hf_eagle.hub.model_card import is_edited
from hf_eagle.serving.commands import serve_commands


@pytest.mark.parametrize("name, path", [("~/a", "{home}/a"), ("~nobody-here/a", "~nobody-here/a"), ("a/~", "a/~")])
def test_a_home_is_expanded_and_an_unknown_users_is_a_folder(name, path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home(name) == Path(path.format(home=tmp_path))


def test_a_folder_whose_name_begins_with_a_tilde_goes_through_all_rooms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("~nobody-here") / "run"
    folder.mkdir(parents=True)
    assert as_named(str(folder)) == str(tmp_path / folder)
    assert is_edited(folder) is False
    assert "~nobody-here/run" in "".join(serve_commands("me/target", str(folder)).values())


@pytest.mark.parametrize(
    "name", ["../x y", "", " ", "a b", "a..b", "/a", "a/", "a//b", ".a", "a/.b", "a.lock", "a~1", "-a"]
)
def test_what_git_takes_for_no_branch_is_named(name):
    with pytest.raises(ValueError, match="^`revision` .* is not a valid branch name: give one like `v2`"):
        check_branch("revision", name)


@pytest.mark.parametrize("name", [None, "main", "v2", "v2.1/draft-k3", "refs/pr/1", "0a1b2c"])
def test_branches(name):
    check_branch("revision", name)
