"""The Hugging Face folder. transformers runs in its own process.

Here the root folder ``kernels`` is on the path, and transformers would import it as the package of that name.
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

from fasttrain.errors import ConfigError
from fasttrain.export.hf import model_card, vit_model_tensors, vit_processor_config
from fasttrain.export.write import write_export
from fasttrain.pipelines import Loader, Pixels, evaluation_view, open_source
from fasttrain.pretrained import Backbone, Blueprint, from_run, from_timm

_PACKAGE = Path(__file__).parents[2] / "fasttrain"
_CODE = """
import sys
from fasttrain.cli import main
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, ViTModel

run, folder, stock = sys.argv[1:]
assert main(["export", run, "--format", "hf", "--output", folder]) == 0
images = load_file("images.safetensors")
vit, info = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert AutoConfig.from_pretrained(folder).model_type == "vit"
features = {
    "vit": vit.eval()(images["vit"]).last_hidden_state[:, 0].contiguous(),
    "stock": AutoModel.from_pretrained(stock).eval()(images["stock"]).pooler_output.contiguous(),
}
save_file(features, "features.safetensors")
"""


def _run(code, arguments, folder, path=""):
    """Run Python code in a folder without network access; return its output."""
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_transformers_gives_the_same_features(dino_run, tmp_path):
    """A run's ViT is a ViTModel, which the export checks too. Another network is in timm's wrapper."""
    vit, stock = tmp_path / "vit", tmp_path / "stock"
    networks = {"vit": from_run(dino_run), "stock": from_timm("test_resnet", seed=2)}
    write_export(networks["stock"], stock, "hf")
    images = {"vit": torch.rand(3, 3, 32, 32), "stock": torch.rand(2, 3, 96, 96)}
    save_file(images, tmp_path / "images.safetensors")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "fasttrain").symlink_to(_PACKAGE)
    out = _run(_CODE, (dino_run, vit, stock), tmp_path, tmp_path / "lib")
    assert "transformers.ViTModel.from_pretrained('vit', add_pooling_layer=False)\n" in out  # and checked
    features = load_file(tmp_path / "features.safetensors")
    for name, backbone in networks.items():
        torch.testing.assert_close(features[name], backbone.network(images[name]), rtol=0, atol=1e-5)
    processor = json.loads((vit / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(networks["vit"].blueprint.pixels.mean)


_PROCESS = """
import sys
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor

image = Image.open("images/it.png")
pixels = {
    folder: AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"].contiguous()
    for folder in sys.argv[1:]
}
save_file(pixels, "pixels.safetensors")
"""


@pytest.mark.slow
def test_transformers_processor_matches_our_evaluation_view(tmp_path):
    """It resizes, then crops; we crop, then resize. On this wide image they differ by 0.2 of 255 on average."""
    coarse = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(coarse).resize((480, 320), Image.Resampling.BICUBIC).save(tmp_path / "images" / "it.png")
    cases = {
        f"{size}{how}": Blueprint("vit_tiny", size, pixels=Pixels(interpolation=how))
        for size in (32, 224)
        for how in ("linear", "cubic")
    }
    for name, blueprint in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(vit_processor_config(blueprint)))
    _run(_PROCESS, cases, tmp_path)
    theirs = load_file(tmp_path / "pixels.safetensors")
    source = open_source(str(tmp_path / "images")).train
    for name, blueprint in cases.items():
        recipe = evaluation_view(blueprint.recipe, blueprint.size)
        loader = Loader(source, recipe, 1, device="cpu", threads=1, shuffle=False, drop_last=False)
        ours = next(iter(loader.epoch(0))).views[0][0]
        loader.close()
        difference = 255 * (ours - theirs[name]).abs() * torch.tensor(blueprint.pixels.std)[:, None, None]
        assert difference.mean() < 0.5, name
        assert difference.max() < 10, name


def test_timm_reads_the_folder_without_timm_s_licence_and_paper(tmp_path):
    folder, backbone = tmp_path / "resnet", from_timm("test_resnet", seed=2)
    write_export(backbone, folder, "hf")
    images = torch.rand(2, 3, 96, 96)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(by_timm(images), backbone.network(images), rtol=0, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "origin_url", "paper_ids", "tag"} & config.keys()
    data, pixels = timm.data.resolve_model_data_config(by_timm), backbone.blueprint.pixels
    assert (tuple(data["mean"]), tuple(data["std"]), data["input_size"][1:]) == (pixels.mean, pixels.std, [160, 160])
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bilinear")


def test_vit_model_tensors_split_queries_keys_and_values():
    vit = from_timm("vit_tiny_patch16_224", size=32).network
    tensors, qkv = vit_model_tensors(vit), vit.blocks[3].attn.qkv
    prefix = "encoder.layer.3.attention.attention"
    parts = [tensors[f"{prefix}.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), qkv.weight)
    assert torch.equal(tensors[f"{prefix}.value.bias"], qkv.bias[-192:])
    assert len(tensors) == len(vit.state_dict()) + 12 * 4


def test_hf_of_an_own_network_is_refused(simclr_run, tmp_path):
    with pytest.raises(ConfigError, match="--format: .*conv_small"):
        write_export(from_run(simclr_run), tmp_path / "own", "hf")
    assert list(tmp_path.iterdir()) == []


def test_model_card_has_the_shape_and_the_pixel_format():
    pixels = Pixels(4, (0.1,) * 4, (0.2,) * 4, pixel_range=(0.0, 4095.0))
    blueprint = Blueprint("vit_tiny", (32, 16), encoders=(4,), pixels=pixels)
    card = model_card(Backbone(blueprint.build(), blueprint, "dino teacher, step 5"))
    for text in ("[batch, 4, 32, 16]", "[0.1, 0.1, 0.1, 0.1]", "[0.2, 0.2, 0.2, 0.2]", "[0.0, 4095.0]"):
        assert text in card
