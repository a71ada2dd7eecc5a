"""What `--model` names: GGUF files by any spelling, alone in a folder or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from srlm_cli.errors import OptionError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.locate import locate


@pytest.fixture
def made_of(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files that were turned into folders."""
    found: list[Path] = []
    monkeypatch.setattr("srlm_cli.models.locate.trainable_folder", lambda gguf, folder: found.append(gguf) or folder)
    return found


@pytest.mark.parametrize("name", ["model.gguf", "model.GGUF", "Q4.Gguf"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_a_gguf_is_a_model_by_itself_and_by_its_folder(
    tmp_path: Path, made_of: list[Path], name: str, by_folder: bool
) -> None:
    file = tmp_path / name
    file.write_bytes(b"GGUF one")
    (tmp_path / "README.md").write_text("about it")
    model = str(tmp_path if by_folder else file)
    first, before = locate(model), fingerprint(model)
    file.write_bytes(b"GGUF two")
    assert made_of == [file]
    assert locate(model) != first and fingerprint(model) != before


def test_a_folder_with_a_configuration_is_loaded_as_it_is(tmp_path: Path, made_of: list[Path]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert locate(str(tmp_path)) == str(tmp_path) and not made_of


def test_of_several_ggufs_one_has_to_be_named(tmp_path: Path, made_of: list[Path]) -> None:
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(OptionError, match=r"contains 2 \.gguf files \(choose one: --model .*a\.gguf"):
        locate(str(tmp_path))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file: .*gone.GGUF"):
        locate(str(tmp_path / "gone.GGUF"))
    with pytest.raises(
        OptionError, match=r"not a model folder: it has no config\.json, adapter_config\.json or \.gguf file"
    ):
        locate(str(tmp_path))
