"""``fasttrain export``: what it leaves is whole, and what cannot be exported is one line."""

import shutil

from fasttrain.cli import main


def test_a_half_written_checkpoint_is_one_line(simclr_run, tmp_path, capsys):
    copy = shutil.copytree(simclr_run, tmp_path / "run")
    (state,) = copy.glob("checkpoints/step-*/mp_rank_00_model_states.pt")
    state.write_bytes(state.read_bytes()[:5000])
    assert main(["export", str(copy), "--format", "safetensors", "--output", str(tmp_path / "n.safetensors")]) == 2
    assert "step-00000002: the checkpoint is corrupt" in capsys.readouterr().err
    assert not (tmp_path / "n.safetensors").exists()


def test_a_former_file_stays_until_the_new_one_is_whole(simclr_run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "n.safetensors"
    command = ["export", str(simclr_run), "--format", "safetensors", "--output", str(file)]
    assert main(command) == 0
    before = file.read_bytes()
    assert file.stat().st_mode & 0o044  # others can read it

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasttrain.export.timm.check_same", full)
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("n.safetensors: cannot be written: No space left on device.\n")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["n.safetensors"]


def test_a_place_that_cannot_be_is_one_line(simclr_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "n.safetensors"
    assert main(["export", str(simclr_run), "--format", "safetensors", "--output", str(target)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "d.safetensors").mkdir()
    target = tmp_path / "d.safetensors"
    assert main(["export", str(simclr_run), "--format", "safetensors", "--output", str(target)]) == 2
    assert "is a folder" in capsys.readouterr().err
