"""The contact sheet shows what a training sees, and says what was drawn."""

import numpy as np
import pytest
from PIL import Image

from fasttrain.cli import main
from fasttrain.config.arguments import parse
from fasttrain.pipelines import Loader, draw_parameters, open_source
from fasttrain.report import contact_sheet as views
from tests.small_runs import write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "noise")


def _config(data, *more):
    return parse(["--method", "simclr", "--recipe", "cifar", "--data_path", str(data), "--seed", "3", *more])[0]


def test_the_pictures_are_the_views_of_epoch_0(data, monkeypatch):
    monkeypatch.setattr(views, "_CELL", 32)  # so that no picture is resized
    config = _config(data)
    sheet = np.asarray(views.contact_sheet(config, 2))
    loader = Loader(open_source(str(data)).train, config.views, 2, seed=3, threads=1)
    batch = next(loader.epoch(0))
    loader.close()
    mean, std = (np.array(v)[:, None, None] for v in (config.views.mean, config.views.std))
    expected = np.rint(255 * (batch.views[0][1, 0].numpy() * std + mean)).clip(0, 255).transpose(1, 2, 0)
    left = views._GAP + 2 * (32 + views._GAP)  # behind the image itself and view 0
    found = sheet[3 * views._GAP :, left:][:32, :32].astype(float)
    assert np.abs(found - expected).max() <= 1


def test_every_parameter_is_said(data):
    config = _config(data)
    drawn = draw_parameters(config.views, 3, 0, np.arange(8), np.full(8, 32), np.full(8, 32))
    lines = [views.describe(config.views.each[0], drawn, 0, b, (32, 32)) for b in range(8)]
    for b, said in enumerate(lines):
        area = np.prod(drawn.end[0, b] - drawn.start[0, b]) / 1024
        assert said[0] == f"global 32 px, {100 * area:.0f} % of the area"
        assert ("flipped" in said[1]) == bool(drawn.flip[0, b])
    assert any(line.startswith("b ") for said in lines for line in said)


@pytest.mark.parametrize("method", ["infomin", "cmc", "dino"])
def test_the_command_writes_a_picture(data, tmp_path, capsys, method):
    path = tmp_path / "sheet.png"
    given = ["--method", method, "--recipe", "cifar", "--data_path", str(data)]
    assert main(["report", "--views", *given, "--images", "2", "--output", str(path)]) == 0
    assert "2 images" in capsys.readouterr().out
    with Image.open(path) as sheet:
        assert sheet.width > 2 * views._CELL


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--images", "33"], "--images 33 is more than the data has, 32"),
        (["--images", "x"], "argument --images: invalid int value: 'x'"),
        (["--output", "/no/such/folder/sheet.png"], "--output /no/such/folder/sheet.png cannot be written"),
        (["--data_path", "/no/such"], "no such folder"),
        (["--lrr", "1"], "--lrr is unknown; did you mean --lr?"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_status_2(data, capsys, more, message):
    given = ["--method", "simclr", "--recipe", "cifar", "--data_path", str(data)]
    assert main(["report", "--views", *given, *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
