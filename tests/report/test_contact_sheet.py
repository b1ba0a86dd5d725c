"""The contact sheet shows the views of a training and their parameters."""

import numpy as np
import pytest
from PIL import Image

from fasttrain.cli import main
from fasttrain.config.arguments import parse
from fasttrain.pipelines import Loader, draw_parameters, open_source
from fasttrain.report import contact_sheet as module


@pytest.fixture
def config(images):
    return parse(["--method", "simclr", "--recipe", "cifar", "--data_path", str(images), "--seed", "3"])[0]


def test_contact_sheet_has_the_views_of_epoch_0(config, monkeypatch):
    monkeypatch.setattr(module, "_CELL", 32)  # no picture is resized
    sheet = np.asarray(module.contact_sheet(config, 2))
    loader = Loader(open_source(config.train.data_path).train, config.views, 2, seed=3, threads=1)
    batch = next(loader.epoch(0))
    loader.close()
    mean, std = (np.array(v)[:, None, None] for v in (config.views.mean, config.views.std))
    expected = np.rint(255 * (batch.views[0][1, 0].numpy() * std + mean)).clip(0, 255).transpose(1, 2, 0)
    left = module._GAP + 2 * (32 + module._GAP)  # after the image and view 0
    view = sheet[3 * module._GAP :, left:][:32, :32].astype(float)
    assert np.abs(view - expected).max() <= 1


def test_describe_lists_the_parameters(config):
    drawn = draw_parameters(config.views, 3, 0, np.arange(8), np.full(8, 32), np.full(8, 32))
    texts = [module.describe(config.views.each[0], drawn, 0, b, (32, 32)) for b in range(8)]
    for b, lines in enumerate(texts):
        area = np.prod(drawn.end[0, b] - drawn.start[0, b]) / 1024
        assert lines[0].startswith("global 32 px, ")
        assert f" {100 * area:.0f} %" in lines[0]
        assert ("flipped" in lines[1]) == bool(drawn.flip[0, b])
    assert any(line.startswith("b ") for lines in texts for line in lines)


@pytest.mark.parametrize(
    ("command", "method"), [(["report", "--views"], "infomin"), (["views"], "cmc"), (["views"], "dino")]
)
def test_views_writes_a_picture(images, tmp_path, capsys, command, method):
    path = tmp_path / "sheet.png"
    flags = ["--method", method, "--recipe", "cifar", "--data_path", str(images)]
    assert main([*command, *flags, "--images", "2", "--output", str(path)]) == 0
    assert "2 images" in capsys.readouterr().out
    with Image.open(path) as sheet:
        assert sheet.width > 2 * module._CELL


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--images", "33"], "--images: "),
        (["--output", "/no/such/folder/sheet.png"], "--output /no/such/folder/sheet.png: "),
        (["--data_path", "/no/such"], "/no/such"),
    ],
)
def test_views_that_cannot_be_drawn_are_refused(images, capsys, more, names):
    assert main(["views", "--method", "simclr", "--recipe", "cifar", "--data_path", str(images), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttrain: {names}")
