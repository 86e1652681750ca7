"""Image backbones and CLIP."""

import pytest
import torch

from shared import data
from shared.errors import UserError
from shared.models import load_clip, load_clip_processor, load_efficientnet_lite0

TOWER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


@pytest.fixture
def clip(tmp_path, save_tokenizer):
    """The folder of a CLIP, which keeps its processor, and the model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = {**TOWER, "vocab_size": 260, "eos_token_id": 256}
    vision = {**TOWER, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    CLIPImageProcessor(size=8, crop_size=8).save_pretrained(tmp_path)
    return tmp_path, model


def test_a_clip_is_loaded_whole(clip):
    folder, saved = clip
    model, tokenizer = load_clip(folder)
    wanted = saved.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert tokenizer.eos_token == "<end>"
    assert load_clip_processor(folder).crop_size["height"] == 8


def test_a_clip_is_guarded_as_language_models_are(clip, change, edit_json):
    folder, _ = clip
    change(folder, lambda tensors: tensors.pop("visual_projection.weight"))
    with pytest.raises(UserError, match=r"\(clip\) holds no weights for 'visual_projection"):
        load_clip(folder)
    edit_json(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "code.Own"})
    with pytest.raises(UserError, match=r"\(clip\): its preprocessor_config.json asks for code"):
        load_clip(folder)


@pytest.mark.parametrize("damage", ["name", "shape", "fewer", "nan", "file"])
def test_a_backbone_that_is_not_the_one_named_is_refused(damage, tmp_path, monkeypatch):
    import timm

    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    first, *_, last = weights
    if damage == "name":
        weights = {name.replace("running_var", "running_mean2"): t for name, t in weights.items()}
    elif damage == "shape":
        weights[last] = torch.ones(3)
    elif damage == "fewer":
        del weights[last]
    elif damage == "nan":
        weights[first].view(-1)[5] = torch.nan
    torch.save(weights, tmp_path / "weights.pth")
    if damage == "file":
        (tmp_path / "weights.pth").write_bytes(b"no weights")
    monkeypatch.setattr(data, "path", lambda name: tmp_path)
    with pytest.raises(UserError, match=r"weights.pth.* ?tf_efficientnet_lite0|'conv_stem") as no:
        load_efficientnet_lite0()
    assert "\n" not in str(no.value)


@pytest.mark.data
@pytest.mark.parametrize("cached", ["efficientnet-lite0"], indirect=True)
@pytest.mark.usefixtures("cached")
def test_efficientnet_gives_a_thousand_finite_numbers():
    model = load_efficientnet_lite0()
    assert not model.training
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model((torch.randint(0, 256, (2, 3, 224, 224), generator=g).float() - 127) / 128)
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    assert not torch.equal(logits[0], logits[1])
