"""Hugging Face's folder. transformers runs in a process of its own.

In this one the root folder ``kernels`` is on the path, which transformers takes for the package of that name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fasttrain.cli import main
from fasttrain.export.hf import vit_model_tensors, vit_processor_config
from fasttrain.pipelines import Loader, Pixels, evaluation_view, open_source
from fasttrain.pretrained import Blueprint, from_run, from_timm

_PACKAGE = Path(__file__).parents[2] / "fasttrain"
_WAYS = ("linear", "cubic")
_CODE = """
import sys
from fasttrain.cli import main
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, ViTModel

run, folder, stock = sys.argv[1:]
assert main(["export", run, "--format", "hf", "--output", folder]) == 0
given = load_file("images.safetensors")
vit, info = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert AutoConfig.from_pretrained(folder).model_type == "vit"
found = {
    "vit": vit.eval()(given["vit"]).last_hidden_state[:, 0].contiguous(),
    "stock": AutoModel.from_pretrained(stock).eval()(given["stock"]).pooler_output.contiguous(),
}
save_file(found, "features.safetensors")
"""


def test_transformers_gives_the_same_features(dino_run, tmp_path):
    """Of a run's ViT as ViTModel, checked by the export too, and of another network in timm's wrapper."""
    vit, stock = tmp_path / "vit", tmp_path / "stock"
    assert main(["export", "--timm", "test_resnet", "--seed", "2", "--format", "hf", "--output", str(stock)]) == 0
    images = {"vit": torch.rand(3, 3, 32, 32), "stock": torch.rand(2, 3, 96, 96)}
    save_file(images, tmp_path / "images.safetensors")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "fasttrain").symlink_to(_PACKAGE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _CODE, *map(str, (dino_run, vit, stock))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "transformers.ViTModel.from_pretrained('vit', add_pooling_layer=False)\n" in done.stdout  # and checked
    found = load_file(tmp_path / "features.safetensors")
    wanted = {"vit": from_run(dino_run), "stock": from_timm("test_resnet", seed=2)}
    for name, backbone in wanted.items():
        torch.testing.assert_close(found[name], backbone.network(images[name]), rtol=0, atol=1e-5)
    processor = json.loads((vit / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(wanted["vit"].blueprint.pixels.mean)


_PROCESS = """
import sys
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor

image = Image.open("images/it.png")
found = {
    folder: AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"].contiguous()
    for folder in sys.argv[1:]
}
save_file(found, "pixels.safetensors")
"""


def test_transformers_sees_what_our_evaluation_sees(tmp_path):
    """Of an image that is no square; resized, then cropped, where we crop, then resize: mean difference 0.2 of 255."""
    coarse = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(coarse).resize((480, 320), Image.Resampling.BICUBIC).save(tmp_path / "images" / "it.png")
    cases = {
        f"{size}{how}": Blueprint("vit_tiny", size, pixels=Pixels(interpolation=how))
        for size in (32, 224)
        for how in _WAYS
    }
    for name, blueprint in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(vit_processor_config(blueprint)))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PROCESS, *cases]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "pixels.safetensors")
    source = open_source(str(tmp_path / "images")).train
    for name, blueprint in cases.items():
        recipe = evaluation_view(blueprint.recipe, blueprint.size)
        loader = Loader(source, recipe, 1, device="cpu", threads=1, shuffle=False, drop_last=False)
        ours = next(iter(loader.epoch(0))).views[0][0]
        loader.close()
        apart = 255 * (ours - theirs[name]).abs() * torch.tensor(blueprint.pixels.std)[:, None, None]
        assert apart.mean() < 0.5, name
        assert apart.max() < 10, name


def test_timm_reads_its_folder_which_claims_nothing_of_timm_s_weights(tmp_path):
    folder = tmp_path / "resnet"
    assert main(["export", "--timm", "test_resnet", "--seed", "2", "--format", "hf", "--output", str(folder)]) == 0
    images, wanted = torch.rand(2, 3, 96, 96), from_timm("test_resnet", seed=2).network
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(by_timm(images), wanted(images), rtol=0, atol=1e-5)
    noted = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "origin_url", "paper_ids", "tag"} & noted.keys()
    pixels = timm.data.resolve_model_data_config(by_timm)
    stock = from_timm("test_resnet").blueprint
    assert [*map(tuple, (pixels["mean"], pixels["std"], pixels["input_size"]))] == [
        stock.mean,
        stock.std,
        (3, 160, 160),
    ]
    assert (pixels["crop_pct"], pixels["interpolation"]) == (0.875, "bilinear")


def test_queries_keys_and_values_come_apart_in_this_order():
    vit = from_timm("vit_tiny_patch16_224", size=32).network
    found, qkv = vit_model_tensors(vit), vit.blocks[3].attn.qkv
    prefix = "encoder.layer.3.attention.attention"
    parts = [found[f"{prefix}.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), qkv.weight)
    assert torch.equal(found[f"{prefix}.value.bias"], qkv.bias[-192:])
    assert len(found) == len(vit.state_dict()) + 12 * 4


@pytest.mark.parametrize("there", [True, False])
def test_what_neither_has_or_what_is_there_is_one_line(simclr_run, tmp_path, capsys, there):
    folder = tmp_path / "own"
    if there:
        folder.mkdir()
    assert main(["export", str(simclr_run), "--format", "hf", "--output", str(folder)]) == 2
    err = capsys.readouterr().err
    assert ("is there already; choose a new folder" if there else "conv_small is no network of timm's") in err
    assert [path.name for path in tmp_path.iterdir()] == (["own"] if there else [])
