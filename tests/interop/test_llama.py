"""Llama, Mistral, Qwen2 and Qwen3 beside the classes of transformers, and there and back."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import reference
from support.forged import bounded_memory
from support.marks import slow
from tpipe_jax.commands.generate import Generator, chooser
from tpipe_jax.commands.trained_model import load
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig, resolved_model
from tpipe_jax.errors import UserError
from tpipe_jax.interop import convert, hugging_face, llama, mixtures, write_folder
from tpipe_jax.interop.hugging_face import Reader
from tpipe_jax.model import reference as plain_model

REASON = 'needs torch and transformers: pip install -e ".[interop]"'
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

# Shapes of which none equals another, and heads whose width does not follow from d_model.
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 53,
    "max_position_embeddings": 24,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 500.0,
    "original_max_position_embeddings": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 300.0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 6, "rms_norm_eps": 1e-3}),
    "llama 3.1": ("llama", {"head_dim": 8, "rope_parameters": LLAMA3}),
    "linear": (
        *("llama",),
        {"head_dim": 6, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    ),
    "tied": ("llama", {"head_dim": 4, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"head_dim": 6, "sliding_window": 5}),
    "mistral 0.3": ("mistral", {"head_dim": 6, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 6, "rope_parameters": YARN}),
    "mixtral": ("mixtral", {"head_dim": 6, "num_local_experts": 5}),
    "qwen3 moe": (
        *("qwen3_moe",),
        {"head_dim": 6, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
    ),
}
T = 24


def made(kind: str, **more: Any) -> Any:
    """A random model of transformers; norms and biases are random too."""
    name, own = KINDS[kind]
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **own, **more})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=[slow(k) if k in ("mixtral", "linear", "mistral 0.3") else k for k in KINDS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def read(folder: Path) -> tuple[ModelConfig, Any]:
    """The model in a folder, and its parameters."""
    adapter, model = hugging_face.read_model(folder, convert.ADAPTERS)
    reader = Reader(folder, adapter, model)
    return model, as_tree(model, adapter.all_weights(model), reader)


def as_tree(model: ModelConfig, weights: list[Any], value: Callable[[str], Any]) -> Any:
    """Parameters by their names as the model has them."""
    params: Any = {"blocks": [{} for _ in range(model.num_layers)]}
    for weight in weights:
        *path, last = weight.name.split("/")
        at = params
        for key in path:
            at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
        at[last] = jnp.asarray(value(weight.name))
        assert at[last].shape == weight.shape, weight.name
    return params


def test_logits_and_gradients_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    gpt = made(kind)
    gpt.save_pretrained(tmp_path)
    model, params = read(tmp_path)
    rows = np.random.default_rng(0).integers(0, 53, (2, T + 1))
    got = plain_model.logits(model, params, jnp.asarray(rows[:, :-1]))
    more = {"output_router_logits": True} if model.num_experts else {}
    result = gpt(torch.from_numpy(rows[:, :-1]), use_cache=False, **more)
    outcome = result.logits
    np.testing.assert_allclose(got, outcome.detach().numpy(), rtol=0, atol=1e-4)

    loss = torch.nn.functional.cross_entropy(
        outcome.reshape(-1, 53), torch.from_numpy(rows[:, 1:]).reshape(-1)
    )
    if model.num_experts:  # the balance loss too, with a weight that makes its gradients matter
        loss = loss + 0.3 * result.aux_loss
    loss.backward()
    there = {}
    for name, parameter in gpt.named_parameters():
        there |= of_experts(model, name.removeprefix("model."), parameter.grad.numpy())
    weights = {weight.name: weight for weight in llama.ADAPTER.all_weights(model)}

    def gradient(name: str) -> np.ndarray:
        weight = weights[name]
        return weight.to_here([there[one] for one in weight.there])

    want = as_tree(model, list(weights.values()), gradient)

    def total(params: Any) -> jax.Array:
        if not model.num_experts:
            return reference.loss(model, params, jnp.asarray(rows))
        loss, balance = reference.losses(model, params, jnp.asarray(rows))
        return loss + 0.3 * balance

    reference.assert_close(jax.grad(total)(params), want, 1e-4)


def of_experts(model: ModelConfig, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """A weight by its name in a folder, or those of all experts, which lie together in memory."""
    names = mixtures.QWEN if model.qk_norm else mixtures.MIXTRAL
    name = name.replace("mlp.gate.", f"{names.folder}.gate.")
    folder, _, last = name.partition(".mlp.experts.")
    if not last:
        return {name: value}
    kinds = (names.gate, names.value) if last == "gate_up_proj" else (names.out,)
    return {
        f"{folder}.{names.folder}.experts.{n}.{kind}.weight": part
        for n, own in enumerate(value)
        for kind, part in zip(kinds, np.split(own, len(kinds)), strict=True)
    }


@pytest.mark.parametrize(
    "name",
    [
        "llama 3.1",
        slow("mistral"),
        slow("qwen2"),
        slow("qwen3"),
        slow("mixtral"),
        slow("qwen3 moe"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """On two stages, from the caches."""
    gpt = made(name)
    gpt.generation_config.eos_token_id = None
    gpt.save_pretrained(tmp_path / "source")
    convert.import_model(tmp_path / "source", tmp_path / "run")
    trained = load(tmp_path / "run", None, Config(mesh=MeshConfig(pipe=2)), jax.devices())
    prompt = [5, 9, 33, 2]
    tokens = Generator(trained.spec, trained.params).tokens_after(prompt, chooser(0))
    got = list(itertools.islice(tokens, 16))
    with torch.no_grad():
        more: Any = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        want = gpt.generate(torch.tensor([prompt]), **more)[0, len(prompt) :].tolist()
    assert got == want


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("qwen2", "bfloat16"),
        ("mistral", "float16"),
        ("llama 3.1", "float32"),
        ("mixtral", "float16"),
        ("qwen3 moe", "bfloat16"),
    ],
)
@pytest.mark.parametrize("shard_bytes", [write_folder.SHARD_BYTES, 4000])
def test_there_and_back_changes_no_bit(
    kind: str, dtype: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder's own format, with what the folder says beside its weights."""
    monkeypatch.setattr(write_folder, "SHARD_BYTES", shard_bytes)
    gpt = made(kind).to(getattr(torch, dtype))
    gpt.generation_config.max_new_tokens = 7
    gpt.save_pretrained(tmp_path / "source", max_shard_size=shard_bytes)
    convert.import_model(tmp_path / "source", tmp_path / "run")
    convert.export_model(tmp_path / "run", tmp_path / "back", None)
    assert (tmp_path / "back" / hugging_face.INDEX).exists() == (shard_bytes == 4000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(gpt)
    assert again.generation_config.max_new_tokens == 7
    before, after = gpt.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name]), name
    differing = {
        name
        for name, value in gpt.config.to_dict().items()
        if again.config.to_dict().get(name) != value
    }
    assert differing <= {"_name_or_path", "transformers_version", "attention_dropout"}


def test_an_export_without_a_source_is_loaded(kind: str, tmp_path: Path) -> None:
    """As a model that was trained here from the start: logits of the class that loads it."""
    gpt = made(kind)
    gpt.save_pretrained(tmp_path / "source")
    convert.import_model(tmp_path / "source", tmp_path / "run")
    (tmp_path / "run" / convert.SOURCE).unlink()
    convert.export_model(tmp_path / "run", tmp_path / "back", None)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    )
    tokens = torch.arange(T)[None] % 53
    with torch.no_grad():
        want, got = (m(tokens, use_cache=False).logits for m in (gpt, again))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("coefficient", "weight"), [(0.02, 0.02), (0, 0.0), (None, None)])
def test_the_weight_of_the_balance_loss_is_the_folders(
    coefficient: float | None, weight: float | None, tmp_path: Path
) -> None:
    made("mixtral").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    settings = json.loads(path.read_text()) | {"router_aux_loss_coef": coefficient}
    path.write_text(json.dumps(settings))
    config = convert.import_model(tmp_path / "source", tmp_path / "run")
    assert config.train.balance_weight == weight
    settings["router_aux_loss_coef"] = "much"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="router_aux_loss_coef=much is no number"):
        convert.import_model(tmp_path / "source", tmp_path / "other")


def test_code_that_a_stranger_names_is_not_handed_on(tmp_path: Path) -> None:
    """Neither by a folder, nor by what a workdir keeps of one."""
    made("llama").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"A": "a.B"}}))
    convert.import_model(tmp_path / "source", tmp_path / "run")
    kept = tmp_path / "run" / convert.SOURCE
    assert "auto_map" not in kept.read_text()
    told = json.loads(kept.read_text())
    told["settings"]["auto_map"] = {"A": "a.B"}
    kept.write_text(json.dumps(told))
    convert.export_model(tmp_path / "run", tmp_path / "back", None)
    assert "auto_map" not in (tmp_path / "back" / "config.json").read_text()
    for broken in ([], {"settings": 3}, told | {"dtypes": {"norm.weight": ["F32"]}}):
        kept.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"hugging_face\.json"):
            convert.export_model(tmp_path / "run", tmp_path / "other", None)


def test_what_is_meant_by_settings_that_are_left_out() -> None:
    """transformers fills them in with the same values."""
    for name in llama.KINDS:
        default = transformers.AutoConfig.for_model(name).to_dict()
        meant = llama.read_model({"model_type": name})
        told = llama.read_model(default)
        assert resolved_model(meant) == resolved_model(told), name


def test_older_folders_name_rotary_positions_otherwise(tmp_path: Path) -> None:
    made("llama 3.1").save_pretrained(tmp_path)
    expected, _ = read(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    old = settings.pop("rope_parameters")
    settings |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": old}
    path.write_text(json.dumps(settings))
    assert read(tmp_path)[0] == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"attention_bias": True}, "attention_bias=True, but the model here has False"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    "ntk": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of type dynamic"),
    "part": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    "untruncated": ({"rope_parameters": YARN | {"truncate": False}}, "truncate=False"),
    "no number": ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta=x is no number"),
    "types": ({"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "each type of layer"),
    "layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "odd heads": ({"head_dim": 5}, "head_width=5 is odd"),
    "heads": ({"num_key_value_heads": 4}, "num_kv_heads=4 does not divide"),
    "dense layers": ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers=.0."),
    "sparse step": ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    "jitter": ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 1}, "experts_per_token=2 is more"),
    "no number of experts": (
        {"model_type": "qwen3_moe", "num_experts_per_tok": None},
        "num_experts_per_tok=None is no number",
    ),
    "eps": ({"rms_norm_eps": "x"}, "norm_eps='x' must be of type float"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_would_compute_something_else_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    settings = {"model_type": "llama", **SIZES, "head_dim": 6, **changes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=sentence):
        hugging_face.read_model(tmp_path, convert.ADAPTERS)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_settings_that_ask_for_more_experts_than_there_are(name: str, tmp_path: Path) -> None:
    """Nothing is made for each of them."""
    made(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text()) | {"num_local_experts": 10**9}
    path.write_text(json.dumps(settings))
    with (
        bounded_memory(2**28),
        pytest.raises(UserError, match=r"config\.json asks for 1000000000 experts in each layer"),
    ):
        convert.import_model(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("change", ["missing", "shape", "foreign", "untied"])
def test_weights_that_do_not_belong_are_named(change: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    made("tied" if change == "untied" else "llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1]
    elif change == "foreign":
        name = "model.layers.1.self_attn.sinks"
        tensors[name] = np.zeros(6, np.float32)
    else:
        name = "lm_head.weight"
        tensors[name] = np.zeros((53, 24), np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=name.removeprefix("model.")):
        read(tmp_path)
