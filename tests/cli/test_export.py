"""``fasttrain export`` leaves complete files."""

import shutil

from fasttrain.cli import main


def _export(run, file):
    return main(["export", str(run), "--format", "safetensors", "--output", str(file)])


def test_export_of_a_corrupt_checkpoint_is_refused(simclr_run, tmp_path, capsys):
    copy = shutil.copytree(simclr_run, tmp_path / "run")
    (state,) = copy.glob("checkpoints/step-*/mp_rank_00_model_states.pt")
    state.write_bytes(state.read_bytes()[:5000])
    assert _export(copy, tmp_path / "n.safetensors") == 2
    assert "step-00000002" in capsys.readouterr().err
    assert not (tmp_path / "n.safetensors").exists()


def test_export_that_fails_leaves_the_earlier_file(simclr_run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "n.safetensors"
    assert _export(simclr_run, file) == 0
    before = file.read_bytes()
    assert file.stat().st_mode & 0o044  # others can read it

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasttrain.export.timm.check_same", full)
    assert _export(simclr_run, file) == 2
    assert f"--output {file}: cannot be written: No space left" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["n.safetensors"]


def test_export_into_an_impossible_path_is_refused(simclr_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for file in (tmp_path / "file" / "n.safetensors", tmp_path / "folder.safetensors"):
        assert _export(simclr_run, file) == 2
        assert capsys.readouterr().err.startswith(f"fasttrain: --output {file}: ")
    assert main(["export", str(simclr_run), "--format", "hf", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"fasttrain: --output {tmp_path}: ")
