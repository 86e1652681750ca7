"""A tiny CLIP of transformers with LoRA adapters, built here: its logits, its scores, and the
command on a folder of images.
"""

import csv

import numpy as np
import pandas as pd
import pytest
import torch
from ecif_problems import normal
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from projects.ecif import Clip, Contrastive, Pairs, score
from projects.ecif.command import main
from projects.ecif.finetune import base_model
from projects.ecif.fit import fit
from shared.errors import UserError
from shared.influence.solvers import dense, matrix_of

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


def tiny(vocabulary: int = 30, end: int = 2) -> CLIPModel:
    torch.manual_seed(0)
    text = {
        **SIZES,
        "vocab_size": vocabulary,
        "max_position_embeddings": 7,
        "eos_token_id": end,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    for parameter in model.parameters():  # wide enough apart that pairs differ
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def adapted(model: CLIPModel):
    torch.manual_seed(1)
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    ).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return tuned


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(3, 30, (7, 7), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 1
    ids[torch.arange(7), torch.tensor([3, 4, 5, 6, 3, 4, 5])] = 2
    mask = (ids == 2).cumsum(1).roll(1, 1).clamp(max=1)
    mask[:, 0] = 0
    return ids, 1 - mask, normal(7, 3, 8, 8, seed=4)


def test_the_logits_are_clips_own(inputs):
    towers = Clip(adapted(tiny()), dtype=torch.float64)
    w = towers.parameters.flat()
    found = towers.logits(w, tuple(one.view(1, *one.shape) for one in inputs))[0]
    ids, mask, pixels = inputs
    with torch.no_grad():
        truth = towers.parameters.call(
            w, input_ids=ids, attention_mask=mask, pixel_values=pixels
        ).logits_per_text
    assert torch.allclose(found, truth, atol=1e-10)
    assert any("logit_scale" in name for name in towers.parameters.names)


def test_the_temperature_is_a_parameter(inputs):
    towers = Clip(adapted(tiny()), dtype=torch.float64)
    w = towers.parameters.flat()
    (scale,) = [where for name, where in towers.parameters.slices.items() if "logit_scale" in name]
    moved = w.clone()
    moved[scale] += 0.1
    batch = tuple(one.unsqueeze(0) for one in inputs)
    assert torch.allclose(
        towers.logits(moved, batch), towers.logits(w, batch) * np.exp(0.1), atol=1e-12
    )


def test_scores_of_a_converged_clip_are_dot_products_pair_by_pair(inputs):
    towers = Clip(adapted(tiny()), select=("*lora_*",), dtype=torch.float64)
    problem = Contrastive(
        towers, Pairs.of(inputs, 4), 500.0, torch.zeros(towers.parameters.size, dtype=torch.float64)
    )
    w = fit(problem, towers.parameters.flat(), hessian=False).w
    matrix = matrix_of(problem.objective().hessian(w), w)
    metric = Contrastive(towers, Pairs.of([one.flip(0) for one in inputs], 5), 0.0).mean_loss
    scores = problem.scores(w, metric, lambda b: dense(matrix, b))
    g = torch.func.grad(metric)(w)
    for pair in range(7):
        effect = torch.linalg.solve(matrix, problem.removal_gradient(w, [pair]))
        assert float(scores[pair]) == pytest.approx(float(g @ effect), abs=1e-10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, save_tokenizer):
    """A CLIP folder, its adapters, and CSV files of 9 pairs, 4 clean ones and a single one."""
    root = tmp_path_factory.mktemp("clip")
    tokenizer = save_tokenizer(root / "clip")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(root / "clip")
    model = tiny(len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(root / "clip")
    CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    ).save_pretrained(root / "clip")
    adapted(model).save_pretrained(root / "lora")
    draw = np.random.default_rng(0)
    names = {"train": range(9), "clean": range(9, 13), "one": range(9, 10)}
    for number in range(13):
        Image.fromarray(draw.integers(0, 256, (10, 9, 3), dtype=np.uint8)).save(
            root / f"{number}.png"
        )
    for name, numbers in names.items():
        with open(root / f"{name}.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["image", "caption"])
            writer.writerows(
                [f"{number}.png", f"{'abcdefghijklm'[number]}x{number}"] for number in numbers
            )
    return root


@pytest.mark.parametrize(
    ("query", "solver"), [("clean", []), ("one", ["--solver", "logra", "--rank", "4"])]
)
def test_the_command_on_a_clip_folder(folders, query, solver):
    out = folders / f"{query}.scores.csv"
    options = [
        "--fit",
        "--dtype",
        "float64",
        "--batch",
        "3",
        "--delta",
        "500",
        "--gradient-tol",
        "1e-7",
        *solver,
    ]
    arguments = [
        "--model",
        folders / "clip",
        "--adapter",
        folders / "lora",
        "--data",
        folders / "train.csv",
    ]
    arguments += ["--query", folders / f"{query}.csv", "--out", out, *options]
    assert main(["score", *map(str, arguments)]) == 0
    found = pd.read_csv(out)
    assert found["caption"].tolist() == [f"{'abcdefghi'[n]}x{n}" for n in range(9)]
    assert sorted(found["rank"]) == list(range(1, 10))
    assert found["score"].abs().max() > 0


def test_equal_captions_go_through_the_text_tower_once(folders):
    """And have the embeddings that they have one by one."""
    model, tokenizer, _ = score.load_clip(folders / "clip", folders / "lora")
    towers = Clip(model, dtype=torch.float64)
    tokens = tokenizer(["ab", "cd", "ab", "ab"], padding=True, return_tensors="pt")
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = (tokens["input_ids"], tokens["attention_mask"], pixels)
    w, seen = towers.parameters.flat(), []
    hook = model.base_model.model.text_model.register_forward_hook(
        lambda _, __, out: seen.append(out.last_hidden_state.shape[0])
    )
    texts, images, _ = towers.embed(w, tuple(part.view(2, 2, *part.shape[1:]) for part in inputs))
    hook.remove()
    assert seen == [2]
    for number in range(4):
        alone = towers.embed(w, tuple(part[number : number + 1] for part in inputs))
        assert torch.allclose(texts.flatten(0, 1)[number], alone[0][0], atol=1e-12)
        assert torch.allclose(images.flatten(0, 1)[number], alone[1][0], atol=1e-12)


def test_adapters_that_are_not_at_a_minimum_are_refused(folders, capsys):
    arguments = [
        "--model",
        folders / "clip",
        "--adapter",
        folders / "lora",
        "--data",
        folders / "train.csv",
    ]
    assert (
        main(
            [
                "score",
                *map(
                    str,
                    [*arguments, "--query", folders / "clean.csv", "--out", folders / "never.csv"],
                ),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ecif: the model is not trained to a minimum: the gradient's norm is")


def test_a_pretrained_clip_is_a_folder(folders, tmp_path):
    found = base_model(str(folders / "clip"))
    assert (found.weights, found.size) == ("pretrained", 8)
    saved = CLIPModel.from_pretrained(folders / "clip", local_files_only=True)
    assert torch.equal(found.model.text_projection.weight, saved.text_projection.weight)
    ids, mask = found.tokens(["ab", "abcdefghijkl"])
    assert ids.shape == mask.shape == (2, 7)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"\(clip\) holds no tokenizer"):
        base_model(str(tmp_path))
    with pytest.raises(UserError, match="no model 'nobody/nothing'"):
        base_model("nobody/nothing")
