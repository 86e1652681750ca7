"""Mutations of shared/models, each of which must turn the tests red.

    python tests/shared/models/mutations.py             # all; some minutes on two cores
    python tests/shared/models/mutations.py tokenizer   # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

GUARD, WEIGHTS, LOADING, FOLDERS, LANGUAGE, LORA, VISION = (
    f"shared/models/{name}.py"
    for name in ("guard", "weights", "loading", "folders", "language", "lora", "vision")
)

FINITE = "shared/finite.py"

MUTATIONS = [
    Mutation(
        GUARD,
        'if "auto_map" in (_read_json(folder / file) or {}):',
        'if file == "config.json" and "auto_map" in config:',
        "a tokenizer brings code along",
        ("guard",),
    ),
    Mutation(
        GUARD,
        "for part in (config, *config.values()):",
        "for part in (config,):",
        "the text part of a model is quantised",
        ("guard",),
    ),
    Mutation(
        GUARD,
        'if (folder / "adapter_config.json").exists():',
        "if False:",
        "the base model of an adapter is loaded from anywhere",
        ("guard",),
    ),
    Mutation(
        GUARD,
        "except (ValueError, RecursionError) as error:",
        "except ValueError as error:",
        "a deeply nested config.json is a traceback",
        ("guard",),
    ),
    Mutation(
        GUARD,
        "except (UserError, MemoryError, torch.OutOfMemoryError):",
        "except (UserError, MemoryError):",
        "too little memory of a GPU is the folder's fault",
        ("guard",),
    ),
    Mutation(
        FINITE,
        "return bool(least.isfinite()) and bool(largest.isfinite())",
        "return bool(largest.isfinite())",
        "minus infinity is finite",
        ("finite",),
    ),
    Mutation(
        FINITE,
        "tensors.state_dict().items() if isinstance",
        "tensors.named_parameters() if isinstance",
        "running means are not looked at",
        ("finite",),
    ),
    Mutation(
        LOADING,
        "return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)",
        "return AutoConfig.from_pretrained(folder, local_files_only=True)",
        "a configuration's code runs once somebody says yes",
        ("guard",),
    ),
    Mutation(
        LOADING,
        'check_finite(model, f"{folder} ({family})")',
        "pass",
        "a model with NaN is loaded",
        ("weights",),
    ),
    Mutation(
        LOADING,
        "stored_tensors(empty_model(kind, config, dtype), folder)",
        "pass",
        "a model is loaded whatever its weights are",
        ("weights",),
    ),
    Mutation(
        LOADING,
        "if family != wanted:",
        "if False:",
        "a llama is loaded as a CLIP",
        ("loading",),
    ),
    Mutation(
        LOADING,
        "vocabulary[token] >= rows:",
        "vocabulary[token] > rows:",
        "a tokenizer has one token more than the embedding rows",
        ("loading",),
    ),
    Mutation(
        LOADING,
        "dict.fromkeys([*ends, tokenizer.eos_token_id])",
        "dict.fromkeys(ends)",
        "the tokenizer's end is not one",
        ("loading",),
    ),
    Mutation(
        LOADING,
        "if end is not None]",
        "if end]",
        "token 0 ends nothing",
        ("loading",),
    ),
    Mutation(
        LOADING,
        "behind = module.num_embeddings - module.padding_idx - 1",
        "behind = module.num_embeddings",
        "the positions behind that of padding are not counted",
        ("loading",),
    ),
    Mutation(
        LOADING,
        "limit is not None and tokens > limit:",
        "limit is not None and tokens >= limit:",
        "a sequence of all positions is refused",
        ("loading",),
    ),
    Mutation(
        WEIGHTS,
        "if target not in known and source in known:",
        "if False:",
        "a mixture that is stored fused is unknown",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        "for source in sorted(heads, key=dot_natural_key):",
        "for source in sorted(heads, reverse=True):",
        "experts are fused in another order",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        "own = copy.deepcopy(converter)",
        "own = converter",
        "what is read of one tensor is kept for the next",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        "source, renamings, converters, model.base_model_prefix, known",
        "source, renamings, converters",
        "a body that was saved alone is not found",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        'if unexpected := sorted(report["unexpected_keys"]):',
        "if unexpected := []:",
        "weights of a larger model are taken for the smaller one's",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        'if mismatched := sorted(report["mismatched_keys"]):',
        "if mismatched := []:",
        "a tensor of another shape is drawn at random",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        "if not dtype.is_floating_point or dtype.itemsize < 2:",
        "if dtype.itemsize < 2:",
        "codes of whole numbers are read as weights",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        "if not dtype.is_floating_point or dtype.itemsize < 2:",
        "if not dtype.is_floating_point:",
        "float8 codes are read as weights",
        ("weights",),
    ),
    Mutation(
        WEIGHTS,
        "with _quiet(), torch.random.fork_rng(devices=[]):",
        "with torch.random.fork_rng(devices=[]):",
        "transformers prints its table",
        ("weights",),
    ),
    Mutation(
        FOLDERS,
        '    "generation_config.json",\n',
        '    "generation_config.json",\n    "*.json",\n',
        "privacy.json goes along",
        ("folders",),
    ),
    Mutation(
        FOLDERS,
        "index.is_file() and not single.is_file():",
        "index.is_file():",
        "the index decides where there is one file",
        ("loading",),
    ),
    Mutation(
        FOLDERS,
        "n != os.path.basename(n) for n in names",
        "not n for n in names",
        "an index points out of the folder",
        ("loading",),
    ),
    Mutation(
        LORA,
        "if apart := sorted(stored.keys() ^ known.keys()):",
        "if apart := sorted(stored.keys() - known.keys()):",
        "an adapter that is missing begins at random",
        ("lora",),
    ),
    Mutation(
        LORA,
        "check_finite(stored.items(), str(file))",
        "pass",
        "adapters with NaN are loaded",
        ("lora",),
    ),
    Mutation(
        VISION,
        'or name.split(".")[-1] != stored.split(".")[-1]:',
        ":",
        "a backbone's means are taken for its variances",
        ("vision",),
    ),
    Mutation(
        VISION,
        'check_finite(model, f"{file} (tf_efficientnet_lite0)")',
        "pass",
        "a backbone with NaN is loaded",
        ("vision",),
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "models", sys.argv[1:], under="shared"))
