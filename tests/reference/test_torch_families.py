# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""Each family against transformers' own code: a small seeded checkpoint, as transformers saves it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

import transformers
from safetensors.torch import load_file, save_file
from tests.checkpoints.tiny import write_tiny
from tests.reference.jina_bert import JinaBertModel
from tests.reference.nomic_moe import NomicMoeModel

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.torch.backend import TorchBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Float32Array, Output, Sequences
from trivec.models import nomic_bert
from trivec.models.pooling import Pooling

pytestmark = pytest.mark.reference

VOCABULARY_SIZE, HIDDEN, POSITIONS = 500, 64, 2048
LENGTHS = (1, 2, 7, 16, 17, 40, 65, 150, 300, 2048)
MODERN_BERT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "local_attention": 16,
    "global_attn_every_n_layers": 3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "initializer_range": 0.3,
    "initializer_cutoff_factor": 2.0,
}
QWEN3 = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 1_000_000.0,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True}
BERT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS + 2,
    "initializer_range": 0.15,
}
DISTILBERT = {
    "vocab_size": VOCABULARY_SIZE,
    "dim": HIDDEN,
    "hidden_dim": 160,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
NTK_FACTOR = 8.0


class Names(NamedTuple):
    """In which spelling a model of transformers is saved, and what is changed afterwards."""

    save_original_format: bool = True  # names as on the hub; else as in transformers 5
    after: Callable[[Any, Path], None] = lambda model, folder: None


def as_new(model: Any, folder: Path) -> None:
    """Make a GTE of transformers what Alibaba's own code calls "new", with NTK-scaled angles.

    transformers has no such scaling; so its angles are set to those of the published formula.
    """
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    code = {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"}
    scaling = {"type": "ntk", "factor": NTK_FACTOR}
    config |= {"model_type": "new", "auto_map": code, "rope_theta": theta, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    head_dim = HIDDEN // config["num_attention_heads"]
    steps = torch.arange(0, head_dim, 2) / head_dim
    frequencies = (theta * NTK_FACTOR) ** -steps / NTK_FACTOR ** (2 / head_dim)
    model.rotary_emb.inv_freq.copy_(frequencies)


def as_nomic(model: Any, folder: Path) -> None:
    """Name the settings as in the config of nomic-embed-text-v1.5."""
    config = json.loads((folder / "config.json").read_text())
    ours = {
        theirs: config.pop(name) for theirs, name in nomic_bert.SETTINGS.items() if name in config
    }
    ours |= {
        "activation_function": "swiglu",
        "rotary_emb_base": config.pop("rope_parameters")["rope_theta"],
        "rotary_emb_fraction": 1.0,
        "rotary_scaling_factor": None,
        "auto_map": {
            "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"
        },
    }
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "nomic_bert"}
            | ours
            | {name: config[name] for name in ("vocab_size", "type_vocab_size")}
        )
    )


def as_voyage(model: Any, folder: Path) -> None:
    """Let a Qwen3 see both ways, and project what it yields, as voyage-4-nano's code does."""
    file, pooling = folder / "model.safetensors", folder / "1_Pooling" / "config.json"
    projection = torch.randn(2 * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) / 8
    save_file(load_file(file) | {"linear.weight": projection}, file, metadata={"format": "pt"})
    for path, changed in (
        (folder / "config.json", {"use_bidirectional_attention": True, "num_labels": 2 * HIDDEN}),
        (pooling, {"word_embedding_dimension": 2 * HIDDEN}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    plain = model.forward

    def forward(input_ids: Any) -> SimpleNamespace:
        hidden = plain(input_ids=input_ids, attention_mask={"full_attention": None})
        return SimpleNamespace(last_hidden_state=hidden.last_hidden_state @ projection.T)

    model.forward = forward


JINA_BERT = BERT | {
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
}
GEMMA3 = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "pad_token_id": 1,
    "max_position_embeddings": POSITIONS,
    "sliding_window": 32,
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ],
    "initializer_range": 0.2,
}
BOTH_WAYS = {"use_bidirectional_attention": True}
NOMIC_MOE = {
    "vocab_size": VOCABULARY_SIZE,
    "n_embd": HIDDEN,
    "n_inner": 96,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": POSITIONS,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu",
    "rotary_emb_base": 10_000.0,
    "type_vocab_size": 1,
    "num_experts": 8,
    "moe_top_k": 2,
    "moe_every_n_layers": 2,
    "moe_normalize_expert_weights": False,
    "qkv_proj_bias": True,
}
PLAIN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "JinaBert": JinaBertModel,
    "NomicMoe": NomicMoeModel,
}  # what transformers has not
FAMILIES: dict[str, tuple[Any, ...]] = {
    "camembert": ("Camembert", BERT, Pooling.MEAN),
    "distilbert": ("DistilBert", DISTILBERT, Pooling.MEAN),
    "mpnet": ("MPNet", BERT | {"layer_norm_eps": 1e-5}, Pooling.MEAN),
    "nomic-bert": ("NomicBert", BERT, Pooling.MEAN, Names(after=as_nomic)),
    "nomic-bert-of-transformers-5": ("NomicBert", BERT, Pooling.MEAN, Names(False)),
    "nomic-bert-of-experts": ("NomicMoe", NOMIC_MOE, Pooling.MEAN),
    "gte-ntk": ("Gte", BERT | {"type_vocab_size": 0}, Pooling.CLS, Names(after=as_new)),
    "gte-of-transformers-5": ("Gte", BERT, Pooling.CLS, Names(False)),
    "jina-bert": ("JinaBert", JINA_BERT, Pooling.MEAN),
    "modernbert-mean": ("ModernBert", MODERN_BERT, Pooling.MEAN),
    "modernbert-cls": ("ModernBert", MODERN_BERT, Pooling.CLS),
    "modernbert-with-biases": ("ModernBert", MODERN_BERT | BIASES, Pooling.CLS),
    "gemma3-both-ways": ("Gemma3Text", GEMMA3 | BOTH_WAYS, Pooling.MEAN),
    "gemma3-causal": ("Gemma3Text", GEMMA3, Pooling.LAST),
    "qwen3": ("Qwen3", QWEN3, Pooling.LAST),
    "qwen3-without-groups": ("Qwen3", QWEN3 | {"num_key_value_heads": 4}, Pooling.LAST),
    "qwen3-both-ways-and-projected": ("Qwen3", QWEN3, Pooling.MEAN, Names(after=as_voyage)),
    "qwen3-with-biases": ("Qwen3", QWEN3 | {"attention_bias": True}, Pooling.LAST),
}


class Saved:
    """A model of transformers, and the same one opened by us from the files it wrote."""

    def __init__(
        self,
        folder: Path,
        name: str,
        config: dict[str, Any],
        pooling: Pooling,
        names: Names | None = None,
    ) -> None:
        torch.manual_seed(3)
        if name in PLAIN:
            self.model = PLAIN[name](config).eval()
        else:
            config_type = getattr(transformers, f"{name}Config")
            self.model = getattr(transformers, f"{name}Model")(
                config_type(**config, attn_implementation="eager")
            ).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.ndim == 1:  # norms and biases, which start at one and at zero
                    weight.add_(0.2 * torch.randn_like(weight))
        self.pooling = pooling
        write_tiny(
            folder / "model",
            hidden=HIDDEN,
            vocabulary_size=VOCABULARY_SIZE,
            pooling=Pooling.CLS,
            heads=False,
        )
        if names is None:
            self.model.save_pretrained(folder / "model")
        else:
            self.model.save_pretrained(
                folder / "model", save_original_format=names.save_original_format
            )
            names.after(self.model, folder / "model")
        opened = open_checkpoint(str(folder / "model"), cache_dir=folder / "cache")
        self.checkpoint: Checkpoint = replace(opened, pooling=(pooling,))

    def expected(self, batch: Batch) -> Float32Array:
        """Unit vectors of transformers, each text alone: `[sequences, hidden]`."""
        rows = []
        for ids in np.split(batch.token_ids, batch.cu_seqlens[1:-1]):
            with torch.inference_mode():
                hidden = self.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
            states = hidden.last_hidden_state[0]
            pooled = {
                Pooling.CLS: states[0],
                Pooling.MEAN: states.mean(0),
                Pooling.LAST: states[-1],
            }[self.pooling]
            rows.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
        return np.array(rows, np.float32)


def batch_of(*lengths: int) -> Batch:
    draw = np.random.default_rng(11)
    ids = [draw.integers(5, VOCABULARY_SIZE, length, dtype=np.int32) for length in lengths]
    packed = Sequences.pack(ids)
    return Batch(packed.token_ids, packed.cu_seqlens, np.full(len(ids), Output.DENSE, np.uint8))


def assert_equal(found: Float32Array, expected: Float32Array) -> None:
    """Unit vectors `[sequences, hidden]`, equal to 1e-4 in each number and 1e-6 in their cosine."""
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert (found.astype(np.float64) * expected).sum(axis=1).min() >= 0.999999


@pytest.fixture(params=list(FAMILIES))
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Saved:
    return Saved(tmp_path, *FAMILIES[request.param])


def test_torch_equals_transformers(saved: Saved) -> None:
    batch = batch_of(*LENGTHS)
    backend = TorchBackend.load(saved.checkpoint, precision="fp32", device="cpu")
    expected = saved.expected(batch)
    assert_equal(backend.run(batch, slot=0).dense, expected)
    assert_equal(backend.run_exact(batch, slot=0).dense, expected)  # the plain form of attention


def test_openvino_equals_transformers(saved: Saved, tmp_path: Path) -> None:
    batch = batch_of(*LENGTHS)
    backend = OpenVinoBackend.load(
        saved.checkpoint, precision="fp32", cores=1, cache_dir=tmp_path / "kept"
    )
    found = backend.run(batch, slot=0).dense
    assert_equal(found, saved.expected(batch))
    for i in range(len(batch)):  # the same bits alone and beside others
        ids = batch.token_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        starts = np.array([0, len(ids)], np.int32)
        alone = backend.run(Batch(ids, starts, batch.outputs[:1]), slot=0).dense
        np.testing.assert_array_equal(alone[0], found[i])


def test_bf16_of_torch_is_near_fp32(saved: Saved) -> None:
    batch = batch_of(*LENGTHS[:-1])
    found = TorchBackend.load(saved.checkpoint, precision="bf16", device="cpu").run(batch, slot=0)
    cosines = (found.dense * saved.expected(batch)).sum(axis=1)
    assert cosines.min() > 0.998, "random weights: an order of magnitude above trained ones' error"


def test_int8_is_near_fp32(saved: Saved, tmp_path: Path) -> None:
    batch = batch_of(*LENGTHS)
    backend = OpenVinoBackend.load(
        saved.checkpoint, precision="int8", cores=1, cache_dir=tmp_path / "kept"
    )
    assert backend.certificate is not None
    assert backend.certificate.passes, backend.certificate.summary
    cosines = (backend.run(batch, slot=0).dense * saved.expected(batch)).sum(axis=1)
    assert cosines.min() > 0.97
    assert cosines.mean() > 0.99


@pytest.mark.parametrize(
    ("family", "precision"), [("modernbert-with-biases", "fp32"), ("modernbert-mean", "bf16")]
)
def test_auto_takes_half_precision_only_where_it_is_near_fp32(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where `auto` would take bf16; the model's notes say why not."""
    monkeypatch.setattr(
        "trivec.backends.torch.backend.choose_precision", lambda *_: ("bf16", "auto: bf16")
    )
    checkpoint = Saved(tmp_path, *FAMILIES[family]).checkpoint
    backend = TorchBackend.load(checkpoint, precision="auto", device="cpu")
    assert backend.precision == precision
    assert ("0.998 to fp32" in backend.notes["precision"]) == (precision == "fp32")
