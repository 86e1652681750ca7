"""Small models with weights large enough for peaked distributions, and an independent sampler: a
forward of everything for each token.
"""

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

EOS = 0
VOCABULARY = 23


def make(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attention: str = "sdpa",
    positions: int = 128,
) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

    common = {"vocab_size": VOCABULARY, "attn_implementation": attention}
    gated = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    match family:
        case "llama":
            config = LlamaConfig(**common, **gated, max_position_embeddings=positions)
        case "qwen3":
            config = Qwen3Config(**common, **gated, head_dim=16, max_position_embeddings=positions)
        case _:
            config = GPT2Config(
                **common,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=positions,
                bos_token_id=0,
                eos_token_id=0,
            )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1 if family == "gpt2" else 0.3 if "embed" in name else 0.2)
    return model


@torch.no_grad()
def naive(
    model: Any,
    prompt: list[int],
    index: int,
    seed: int,
    limit: int,
    temperature: float = 1.0,
    eos: tuple[int, ...] = (EOS,),
):
    """One completion by a forward of the whole sequence for each token, and a walk along the
    distribution function in numpy.
    """
    digest = hashlib.blake2b(repr((seed, index, tuple(prompt))).encode(), digest_size=16).digest()
    numbers = np.random.Generator(
        np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    ).random(limit)
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < limit:
        logits = (
            model(input_ids=torch.tensor([prompt + tokens]), use_cache=False)
            .logits[0, -1]
            .double()
            .numpy()
        )
        if temperature == 0:
            chosen = int(np.argmax(logits))
            scaled = logits
        else:
            scaled = logits / temperature
            chances = np.exp(scaled - scaled.max())
            chances /= chances.sum()
            left, chosen = numbers[len(tokens)], 0
            while left >= chances[chosen] and chosen < len(chances) - 1:
                left -= chances[chosen]
                chosen += 1
        tokens.append(chosen)
        logprobs.append(
            float(scaled[chosen] - scaled.max() - np.log(np.exp(scaled - scaled.max()).sum()))
        )
        if chosen in eos:
            break
    return tokens, logprobs


@pytest.fixture(scope="session")
def llama() -> Any:
    return make()


@pytest.fixture(scope="session")
def helpers() -> SimpleNamespace:
    return SimpleNamespace(make=make, naive=naive, EOS=EOS, VOCABULARY=VOCABULARY)


@pytest.fixture(scope="session")
def save_tokenizer() -> Any:
    """A function `save(folder)` that saves a tokenizer there and returns it: a token per character,
    a chat template. It stands here and not above, so that the mutations, which run in a
    copy of this folder alone, have it.
    """

    def save(folder: Any) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = ["<end>", *map(chr, range(32, 127))]
        made = Tokenizer(
            models.WordLevel(
                {letter: number for number, letter in enumerate(letters)}, unk_token="<end>"
            )
        )
        made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        made.decoder = decoders.Fuse()
        template = (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system"
            " role') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}{%"
            " if add_generation_prompt %}<assistant>{% endif %}"
        )
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=made, eos_token="<end>", chat_template=template
        )
        wrapped.save_pretrained(folder)
        return wrapped

    return save


@pytest.fixture
def trl_trainer(tmp_path: Any, save_tokenizer: Any) -> Any:
    """A function that makes a `GRPOTrainer` on a small policy with a token per character. It keeps
    in `seen` what each loss was of, and the log-probabilities that TRL trains with.
    """
    trl = pytest.importorskip("trl", reason="TRL is in the extra `peers`")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    class Trainer(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            ids, mask = (
                torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1)
                for kind in ("ids", "mask")
            )
            with torch.no_grad():
                trained = self._get_per_token_logps_and_entropies(
                    model, ids, mask, inputs["completion_ids"].shape[1]
                )[0]
            self.seen.append(
                {**{key: value.clone() for key, value in inputs.items()}, "trained": trained}
            )
            return super()._compute_loss(model, inputs)

    def make(
        prompts: Any,
        reward: Any,
        rollout_func: Any = None,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
        peft_config: Any = None,
        **options: Any,
    ) -> Any:
        tokenizer = tokenizer or save_tokenizer(tmp_path)
        torch.manual_seed(0)
        shape = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        end = tokenizer.eos_token_id
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            **shape,
            eos_token_id=end,
            pad_token_id=end,
            bos_token_id=None,
        )
        model = LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():  # completions of different lengths
            model.lm_head.weight.mul_(8.0)[end] *= 3
        settings = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": [],
            "logging_steps": 1, "save_strategy": "no",
            "disable_tqdm": True, "num_generations": 4, "per_device_train_batch_size": 4,
            "max_completion_length": 12, "max_steps": 1,
            "shuffle_dataset": False, "lr_scheduler_type": "constant", "loss_type": "grpo",
            "seed": 3, "gradient_checkpointing": False,
        }  # fmt: skip
        args = trl.GRPOConfig(**{**settings, **options})
        trainer = Trainer(
            model=model, reward_funcs=reward, args=args, processing_class=tokenizer,
            rollout_func=rollout_func,
            peft_config=peft_config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            eval_dataset=Dataset.from_list([{"prompt": prompts[0]}]),
        )  # fmt: skip
        trainer.seen = []
        return trainer

    return make
