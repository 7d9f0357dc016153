"""The names that people type from habit, with the names that they have here. No jax."""

import difflib
from collections.abc import Sequence

FORMATS = {
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
}

_USUAL = {
    "config.model.num-layers": "layers n-layer n-layers num-hidden-layers depth",
    "config.model.d-model": "n-embd hidden-size hidden-dim dim embed-dim emb-dim width",
    "config.model.num-heads": "heads n-head n-heads num-attention-heads",
    "config.model.d-ff": "ffn-hidden-size intermediate-size mlp-dim",
    "config.model.seq-len": "block-size context-length context-size sequence-length seq-length "
    "seqlen max-seq-len max-length max-position-embeddings n-ctx ctx",
    "config.mesh.data": "dp data-parallel data-parallel-size dp-size",
    "config.mesh.pipe": "pp pipeline pipeline-parallel pipeline-model-parallel-size pp-size stages "
    "num-stages",
    "config.mesh.model": "tp tensor-parallel tensor-model-parallel-size tensor-parallel-size "
    "tp-size",
    "config.plan.token-slices": "slices num-slices",
    "config.train.num-steps": "steps max-steps num-iterations iterations iters max-iters "
    "train-iters",
    "config.train.batch-size": "bs batch global-batch-size per-device-train-batch-size",
    "config.train.eval-every": "eval-interval eval-steps val-every",
    "config.train.log-every": "log-interval logging-steps log-freq",
    "config.optim.learning-rate": "lr max-lr peak-lr",
    "config.optim.warmup-steps": "warmup warmup-iters lr-warmup-iters lr-warmup-steps",
    "config.optim.weight-decay": "wd",
    "config.optim.grad-clip": "clip-grad gradient-clip max-grad-norm clip",
    "config.optim.beta1": "adam-beta1 b1",
    "config.optim.beta2": "adam-beta2 b2",
    "config.data.train": "data dataset data-path dataset-path train-data train-file input-file",
    "config.data.eval": "val-data valid-data validation-data eval-data validation-file",
    "config.data.tokenizer": "tokenizer tokenizer-model tokenizer-path tokenizer-name",
    "config.checkpoint.every": "save-interval save-every save-steps checkpoint-interval",
    "config.precision.compute": "dtype precision mixed-precision bf16 fp16 compute-dtype amp",
    "config.memory.remat": "remat recompute activation-checkpointing gradient-checkpointing",
    "config.metrics.wandb": "wandb wandb-project",
    "workdir": "output-dir out-dir output out save save-dir run-dir logdir log-dir checkpoint-dir",
    "local-processes": "nproc-per-node nproc",
}
_RIGHT = {habit: f"--{name}" for name, habits in _USUAL.items() for habit in habits.split()}
_SENTENCES = {
    "workdir": {
        "resume resume-from-checkpoint resume-from continue load restore": "--workdir=RUN goes on "
        "with the run in that folder",
    },
    "config.mesh.pipe": {
        "num-gpus gpus devices num-devices": "the number of devices is the product of "
        "--config.mesh.data, --config.mesh.pipe and --config.mesh.model",
    },
    "config.plan.batch-slices": {
        "micro-batch-size microbatch-size": "--config.plan.batch-slices=uniform:N cuts the batch "
        "of a data shard into N",
        "microbatches num-microbatches gradient-accumulation-steps grad-accum accum": "the setting "
        "is --config.plan.batch-slices=uniform:N",
    },
    "config.train.num-steps": {
        "epochs num-epochs num-train-epochs": "length is counted in steps, by "
        "--config.train.num-steps",
    },
}


def advice(flag: str, names: Sequence[str]) -> str:
    """Returns what to type instead of a flag that does not exist, where `names` do."""
    word = flag.removeprefix("--")
    for name, sentences in _SENTENCES.items():
        for habits, sentence in sentences.items():
            if word in habits.split() and f"--{name}" in names:
                return sentence
    last = word.rpartition(".")[2]
    if _RIGHT.get(last) in names:
        return f"the setting is {_RIGHT[last]}"
    same = [name for name in names if name.endswith((f".{word}", f"-{word}"))]
    same = same or [name for name in names if name.rpartition(".")[2].lstrip("-") == last]
    if same:
        return f"the setting is {' or '.join(same)}"
    # The last words are compared too, since whole flags are alike in --config. alone.
    ends = {name.rpartition(".")[2].lstrip("-"): name for name in reversed(names)}
    near = nearest(flag, names, 0.8) or ends.get(nearest(last, list(ends), 0.8) or "")
    return f"did you mean {near}" if near else "it is not a setting of this command"


def nearest(word: str, words: Sequence[str], least: float = 0.7) -> str | None:
    """Returns the most similar of some words, if one is at least that similar (1: equal)."""
    return next(iter(difflib.get_close_matches(word, words, 1, least)), None)
