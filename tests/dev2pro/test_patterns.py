import pytest

from data.storage import urls
from dev2pro import patterns
from dev2pro.errors import DataError

FOLDERS = ("shots [2020]", "a{1,2}", "what?", "*")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (*FOLDERS, "a1", "shots 2"):
        (tmp_path / folder).mkdir()
        for name in ("0.tar", "1.tar"):
            (tmp_path / folder / name).touch()
    return tmp_path


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_exists_is_itself_and_only_the_rest_is_a_pattern(folder, places):
    assert patterns.matches(folder) == [folder]
    assert patterns.matches(f"{folder}/*.tar") == [f"{folder}/0.tar", f"{folder}/1.tar"]
    assert urls.expand(folder, "data.train") == [f"{places}/{folder}"]
    for pattern in (f"{folder}/*.tar", f"{places}/{folder}/{{0..1}}.tar", f"{folder}/[01].tar"):
        assert urls.expand(pattern, "data.train") == [f"{places}/{folder}/0.tar", f"{places}/{folder}/1.tar"]


def test_a_pattern_below_a_working_folder_with_a_strange_name(places, monkeypatch):
    monkeypatch.chdir(places / "shots [2020]")
    assert urls.expand("*.tar", "data.train") == [f"{places}/shots [2020]/{name}.tar" for name in "01"]


def test_what_does_not_exist_is_a_pattern_still(places):
    assert patterns.matches("shots [0-9]/0.tar") == ["shots 2/0.tar"]
    with pytest.raises(DataError, match=r"nothing matches a3, one of a\{1,3\}"):
        urls.expand("a{1,3}", "data.train")
