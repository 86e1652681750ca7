"""Models by name, and the packaged ones by what they know."""

import pytest
import torch

from shared.errors import UserError
from shared.models import (
    causal_lm_config,
    empty_causal_lm,
    load_causal_lm,
    load_sentence_encoder,
    local_model,
    random_causal_lm,
)


@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_model_has_its_ties_and_no_memory(tied, tmp_path):
    made = random_causal_lm(causal_lm_config("llama", 2, 24, 4, vocabulary=101, tied=tied))
    made.save_pretrained(tmp_path)
    empty = empty_causal_lm(tmp_path)
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in made.named_parameters()
    }


def test_a_folder_is_a_model_if_it_has_a_config(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json"):
        local_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert local_model(tmp_path) == tmp_path
    assert local_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nobody/nothing-of-the-kind", "no such thing", "/not/a/folder"])
def test_what_is_not_there_is_refused_with_what_would_bring_it(name):
    with pytest.raises(UserError, match=r"no model '.*hf download") as caught:
        local_model(name)
    assert "\n" not in str(caught.value)


# ---- packaged models -----------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("cached", ["smollm2-135m"], indirect=True)
@pytest.mark.usefixtures("cached")
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = load_causal_lm("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(
            **ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


@pytest.mark.data
@pytest.mark.parametrize("cached", ["minilm-l6"], indirect=True)
@pytest.mark.usefixtures("cached")
def test_minilm_puts_like_beside_like():
    encoder = load_sentence_encoder()
    sentences = [
        "A man is eating pasta.",
        "Someone eats noodles.",
        "The stock market fell sharply.",
        "x",
    ]
    with torch.no_grad():
        vectors = encoder(**encoder.tokens(sentences))
        alone = encoder(**encoder.tokens(sentences[:1]))
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(vectors[0], alone[0], atol=1e-5, rtol=1e-4)  # padding does not show
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 1] > similarity[0, 2] + 0.3
    assert encoder.tokens(["word " * 500], max_tokens=32)["input_ids"].shape == (1, 32)
