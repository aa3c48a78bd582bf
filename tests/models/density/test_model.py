"""Density models against the trunk and scipy, their derivatives in time, and their folders."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import continuous_lm as clm
from continuous_lm.models import density, transformer, trunk_inputs
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import flatten, initialize, unflatten
from continuous_lm.models.transformer import Transformer
from tests.continuous_lm.test_tokenization import STORIES
from tests.fixtures import many_devices, tiny
from tests.fixtures.malformed import (
    compose,
    parse,
    serialize,
    tensors_in,
)
from tests.fixtures.params import assert_same_params
from tests.models.density.test_distributions import at, reference

KEY = jax.random.key(0)
CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=6,
    mlp_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
KINDS = {
    "token": heads.TokenHead(width=11),
    "gaussian": heads.GaussianHead(width=6),
    "low rank": heads.GaussianHead(width=6, covariance="low_rank", rank=2),
    "full": heads.GaussianHead(width=6, covariance="full", depth=1, mlp_size=5),
    "mixture": heads.MixtureHead(width=6, components=3, depth=1, mlp_size=5),
    "experts": heads.ExpertsHead(width=6, experts=3, top_k=2, expert_size=4),
}
N, WIDTH = 6, 3  # WIDTH: of plain vectors
CASES = [(name, "tokens") for name in KINDS] + [
    (name, "vectors") for name in KINDS if name[0] != "t"
]
QUICK = [("full", "tokens"), ("mixture", "vectors")]
slow = pytest.mark.slow


def cases(quick):
    return [
        pytest.param(*case, id="-".join(case), marks=() if case in quick else slow)
        for case in CASES
    ]


def random_like(table, seed=0):
    """Path -> random parameter, far from its initial value."""
    rng, flat_params = np.random.default_rng(seed), {}
    for path, declaration in table.items():
        mean = float(path.startswith("trunk/") and path.endswith("scale"))
        spread = 0.8 if path in ("head/mean", "head/logits", "table") else 0.4
        values = mean + spread * rng.normal(size=declaration.shape)
        flat_params[path] = jnp.asarray(values, jnp.float32)
    return flat_params


@functools.cache
def build(name, reads="tokens", table="frozen", contrast=0.0):
    head = KINDS[name]
    if reads == "vectors":
        head = dataclasses.replace(head, width=WIDTH)
    model = DensityModel(
        CONFIG, head, input_kind=reads, table=table, token_loss_weight=contrast
    )
    params = unflatten(random_like(model.parameter_table()))
    return LanguageModel(model, params)


def sequence(reads, seed=0):
    """Inputs [T] or [T, W] by name, and durations [T]."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(N, WIDTH)).astype(np.float32)
    inputs = (
        {"tokens": rng.integers(0, 11, N)}
        if reads == "tokens"
        else {"vectors": vectors}
    )
    return inputs, rng.uniform(0.3, 2.0, N).astype(np.float32)


# --- Log densities, hidden states and gradients ----------------------------------------------


@jax.jit
def trunk_hidden_states(params, durations, **context):
    """Hidden states of the trunk, computed without the density model."""
    inputs = trunk_inputs.make_inputs(CONFIG, durations=durations, **context)
    return transformer.hidden_states(CONFIG, params, inputs).hidden


@functools.partial(jax.jit, static_argnums=0)
def distribution_of(head, params, hidden):
    return head.distribution(params, hidden)


@pytest.mark.parametrize(("name", "reads"), cases(QUICK))
def test_log_prob_equals_scipy_on_the_trunks_hidden_states(name, reads):
    lm, (inputs, d) = build(name, reads), sequence(reads)
    if reads == "tokens":
        context, targets = {"tokens": inputs["tokens"][:-1]}, inputs["tokens"][1:]
        if "table" in lm.params:
            targets = np.asarray(lm.params["table"])[targets]
    else:
        embeddings = inputs["vectors"] @ np.asarray(lm.params["read"]).T
        context, targets = {"embeddings": embeddings[:-1]}, inputs["vectors"][1:]
    hidden = trunk_hidden_states(lm.params["trunk"], d[:-1], **context)
    assert hidden.shape == (N - 1, 6)
    distribution = distribution_of(lm.model.head, lm.params["head"], hidden)
    if name == "token":
        logits = np.asarray(distribution.logits, np.float64)
        expected = log_softmax(logits, axis=-1)[np.arange(N - 1), targets]
    else:
        expected = [reference(at(distribution, i), targets[i]) for i in range(N - 1)]
    log_probs = density.log_prob(lm, **inputs, durations=d)
    np.testing.assert_allclose(log_probs, expected, rtol=2e-5, atol=2e-5)
    assert np.abs(np.diff(log_probs)).min() > 1e-3


@slow
def test_apply_returns_the_hidden_states_of_the_trunk():
    lm, (inputs, d) = build("gaussian"), sequence("tokens")
    trunk, params = Transformer(CONFIG), lm.params["trunk"]
    hidden = trunk_hidden_states(params, d, **inputs)
    logits = trunk.apply({"params": params}, **inputs, durations=d)
    np.testing.assert_allclose(hidden @ params["head"].T, logits, rtol=1e-5, atol=1e-5)
    for position in (None, -1, 2):
        states = lm.model.apply(
            {"params": lm.params}, **inputs, durations=d, position=position
        )
        expected = hidden if position is None else hidden[position]
        np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reads", [pytest.param("tokens", marks=slow), "vectors"])
def test_log_prob_by_durations_times_and_start(reads):
    """Durations are 1 by default, and the last one has no effect."""
    lm, (inputs, d) = build("mixture", reads), sequence(reads)

    def log_prob(**timing):
        return np.asarray(density.log_prob(lm, **inputs, **timing))

    by_default, by_durations = log_prob(), log_prob(durations=d)
    assert by_default.shape == (N - 1,)
    np.testing.assert_allclose(log_prob(durations=np.ones(N)), by_default, rtol=1e-6)
    assert np.abs(by_durations - by_default).max() > 1e-3
    last_is_0 = np.append(d[:-1], np.float32(0.0))
    np.testing.assert_array_equal(log_prob(durations=last_is_0), by_durations)
    end_times = (3.0 + np.cumsum(d)).astype(np.float32)
    by_times = log_prob(durations=d, times=end_times)
    np.testing.assert_allclose(by_times, by_durations, rtol=1e-3, atol=1e-4)
    by_start = log_prob(durations=d, start=3.0)
    np.testing.assert_allclose(by_start, by_times, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "reads"), cases([("gaussian", "tokens")]))
def test_gradients_of_durations_match_finite_differences(name, reads):
    """Central differences in float64, one duration at a time."""
    lm, (inputs, d) = build(name, reads), sequence(reads)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(jnp.float64), lm.params)

        @jax.jit
        @jax.value_and_grad
        def total(d):
            model_inputs = lm.model.make_inputs(**inputs, durations=d)
            return lm.model.log_prob(params, model_inputs).sum()

        d = d.astype(np.float64)
        gradient, step = np.asarray(total(d)[1]), 1e-5
        assert gradient.dtype == np.float64
        slopes = [
            (total(d + step * e)[0] - total(d - step * e)[0]) / (2 * step)
            for e in np.eye(N)
        ]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-8)
    assert gradient[-1] == 0.0
    assert np.abs(gradient[:-1]).min() > 1e-5


@pytest.mark.parametrize(
    ("name", "reads", "contrast"),
    [
        ("token", "tokens", 0.0),
        pytest.param("gaussian", "tokens", 0.5, marks=slow),
        pytest.param("mixture", "vectors", 0.0, marks=slow),
    ],
)
def test_batches_of_durations_equal_one_call_for_each(name, reads, contrast):
    lm, (inputs, d) = build(name, reads, contrast=contrast), sequence(reads)
    sweep = np.asarray(clm.durations.scale(d, [0.5, 1.0, 2.0, 3.0], (1, 3)))
    for score in (density.log_prob, density.loss):
        scores = np.asarray(score(lm, **inputs, durations=sweep))
        assert scores.shape == (4, N - 1)
        for row, durations in zip(scores, sweep, strict=True):
            alone = score(lm, **inputs, durations=durations)
            np.testing.assert_allclose(row, alone, rtol=2e-4, atol=1e-5)
    assert np.abs(scores[0] - scores[3]).max() > 1e-3


# --- Tables ----------------------------------------------------------------------------------


def loss_gradient(lm, tokens):
    def loss(params):
        return lm.model.loss(params, lm.model.make_inputs(tokens)).sum()

    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(lm.params))


def test_only_learned_tables_have_gradients():
    tokens = np.array([1, 2, 3, 4])  # the last is not read, only predicted
    frozen = loss_gradient(build("gaussian", contrast=0.5), tokens)
    np.testing.assert_array_equal(frozen["table"], 0.0)
    of_embedding = np.asarray(frozen["trunk"]["embedding"])
    np.testing.assert_array_equal(of_embedding[4], 0.0)
    assert np.abs(of_embedding[1]).max() > 1e-4
    assert np.abs(frozen["head"]["mean"]).max() > 1e-4
    learned = loss_gradient(build("gaussian", table="embedding"), tokens)
    assert "table" not in learned
    of_embedding = np.asarray(learned["trunk"]["embedding"])
    assert np.abs(of_embedding[4]).max() > 1e-4
    assert np.abs(of_embedding[9]).max() > 1e-6  # by the standardisation


@pytest.mark.parametrize("table", ["frozen", pytest.param("embedding", marks=slow)])
def test_loss_adds_the_weighted_cross_entropy_of_the_renormalised_density(table):
    lm, (inputs, d) = build("mixture", table=table, contrast=0.7), sequence("tokens")
    tokens = inputs["tokens"]
    if table == "frozen":
        rows = np.asarray(lm.params["table"])
    else:
        rows = np.asarray(lm.params["trunk"]["embedding"])
        rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    np.testing.assert_allclose(density.token_table(lm), rows, rtol=1e-4, atol=1e-5)
    hidden = trunk_hidden_states(lm.params["trunk"], d[:-1], tokens=tokens[:-1])
    mixture = distribution_of(lm.model.head, lm.params["head"], hidden)
    logits = np.stack([reference(at(mixture, i), rows) for i in range(N - 1)])
    np.testing.assert_allclose(
        density.token_logits(lm, tokens, durations=d), logits, rtol=1e-4, atol=1e-3
    )
    targets = np.arange(N - 1), tokens[1:]
    dimensions = 6
    cross_entropy = -log_softmax(logits, axis=-1)[targets]
    expected = -logits[targets] + 0.7 * dimensions * cross_entropy
    np.testing.assert_allclose(
        density.loss(lm, tokens, durations=d), expected, rtol=1e-4, atol=1e-3
    )


def test_standardize_table():
    rng = np.random.default_rng(0)
    table = (5.0 + rng.normal(size=(40, 4)) * [1e-6, 0.02, 1.0, 0.0]).astype(np.float32)
    table[:, 0] -= 5.0
    standardize = jax.jit(density.standardize_table)
    rows = np.asarray(standardize(table))
    np.testing.assert_allclose(rows.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(rows.std(axis=0), [1.0, 1.0, 1.0, 0.0], rtol=0.02)
    gradient = jax.jit(jax.grad(lambda t: (density.standardize_table(t) ** 3).sum()))
    assert np.isfinite(gradient(table)).all()
    with jax.enable_x64(True):
        assert standardize(table.astype(np.float64)).dtype == jnp.float64


def test_new_models_standardise_and_freeze_their_table():
    """All heads start from the same trunk: initial values depend on path and key."""
    table = 3.0 + 0.1 * np.random.default_rng(0).normal(size=(11, 6))
    lm, other = (
        density.create(KEY, CONFIG, KINDS[name], table=table)
        for name in ("gaussian", "mixture")
    )
    assert lm.model.table == "frozen"
    expected = (table - table.mean(axis=0)) / table.std(axis=0)
    np.testing.assert_allclose(lm.params["table"], expected, rtol=1e-3, atol=1e-4)
    assert np.isfinite(density.log_prob(lm, sequence("tokens")[0]["tokens"])).all()
    assert_same_params(lm.params["trunk"], other.params["trunk"])
    on_trunk = density.add_head(density.trunk_of(lm), KINDS["gaussian"], key=KEY)
    assert_same_params(on_trunk.params["head"], lm.params["head"])


@slow
def test_initial_values_of_the_trunk_depend_only_on_path_and_key():
    lm = density.create(KEY, CONFIG, KINDS["gaussian"])
    trunk_table = lm.model.parameter_table()
    trunk_table = {k: d for k, d in trunk_table.items() if k.startswith("trunk/")}
    same_within = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(same_within, lm.params["trunk"], initialize(KEY, trunk_table)["trunk"])


# --- Folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reads"), cases(CASES))
def test_saved_models_and_their_trunks_load_bit_for_bit(name, reads, tmp_path):
    lm, folder, other_folder = build(name, reads), tmp_path / "a", tmp_path / "b"
    clm.save(folder, lm)
    loaded = clm.load(folder)
    assert dataclasses.replace(loaded.model, config=CONFIG) == lm.model
    assert_same_params(loaded.params, lm.params)
    trunk = density.trunk_of(clm.load(folder))
    assert_same_params(trunk.params, lm.params["trunk"])
    assert trunk.model == Transformer(loaded.config)
    clm.save(other_folder, loaded)
    clm.save(other_folder, trunk)  # replaces all files of the folder
    assert clm.load(other_folder).model == trunk.model
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "density.json",
        "density.safetensors",
        "model.safetensors",
    ]


def test_settings_tokenizer_and_fields_round_trip(tmp_path):
    lm = build("gaussian", table="embedding", contrast=0.25)
    tokenizer = tiny.word_tokenizer("a b c d e")
    lm = dataclasses.replace(lm, tokenizer=tokenizer, hf_fields={"eos_token_id": 3})
    density.save(tmp_path, lm)
    density.save(tmp_path, lm)  # over itself
    back = density.load(tmp_path, dtype=jnp.bfloat16)
    assert (back.model.table, back.model.token_loss_weight) == ("embedding", 0.25)
    assert back.hf_fields["eos_token_id"] == 3
    assert back.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert back.params["trunk"]["embedding"].dtype == jnp.bfloat16
    assert_same_params(back.params["head"], lm.params["head"])
    assert np.isfinite(density.log_prob(back, np.array([1, 2, 3]))).all()


MESH_PROGRAM = """
import sys
import jax, numpy as np
from continuous_lm.models import density

assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("data", "model"))
for folder in sys.argv[1:]:
    many, one = density.load(folder, mesh=mesh), density.load(folder)
    for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        assert len(a.sharding.device_set) == 8 and len(b.sharding.device_set) == 1
        np.testing.assert_array_equal(a, b)
    rng = np.random.default_rng(0)
    inputs = {"tokens": rng.integers(0, 11, (2, 6))}
    if many.model.input_kind == "vectors":
        inputs = {"vectors": rng.normal(size=(2, 6, 3)).astype(np.float32)}
    expected = density.log_prob(one, **inputs)
    np.testing.assert_allclose(density.log_prob(many, **inputs), expected, rtol=1e-4, atol=1e-5)
"""


@slow
def test_loading_onto_a_mesh_changes_no_log_prob(tmp_path):
    folders = []
    for name, reads in CASES:
        folders.append(str(tmp_path / f"{name}-{reads}"))
        density.save(folders[-1], build(name, reads))
    many_devices.run_on_devices(MESH_PROGRAM, 8, *folders)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "made"
    density.save(folder, build("mixture", "vectors"))
    return folder


def edited(change):
    """A change of the settings as one of the folder."""

    def edit(folder):
        path = folder / "density.json"
        settings = json.loads(path.read_text())
        change(settings)
        path.write_text(json.dumps(settings))

    return edit


def setting(name, value):
    return edited(lambda settings: settings.update({name: value}))


def of_head(name, value):
    return edited(lambda settings: settings["head"].update({name: value}))


def tensors(change):
    def edit(folder):
        path = folder / "density.safetensors"
        tensors_by_name = tensors_in(path.read_bytes())
        change(tensors_by_name)
        path.write_bytes(serialize(tensors_by_name))

    return edit


def torn(folder):
    path = folder / "density.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def of_integers(folder):
    path = folder / "density.safetensors"
    header, data = parse(path.read_bytes())
    header["read"]["dtype"] = "I32"
    path.write_bytes(compose(header, data))


MALFORMED = {
    "no settings": (lambda f: (f / "density.json").unlink(), "density.json is missing"),
    "no weights": (
        lambda f: (f / "density.safetensors").unlink(),
        "density.safetensors is missing",
    ),
    "no trunk": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "torn settings": (
        lambda f: (f / "density.json").write_text('{"format": 1'),
        "density.json",
    ),
    "a list": (lambda f: (f / "density.json").write_text("[1]"), "density.json"),
    "torn weights": (torn, "density.safetensors"),
    "integers": (of_integers, "I32"),
    "left over": (
        tensors(lambda t: t.update(more=np.zeros(2, np.float32))),
        "more is left over",
    ),
    "missing": (tensors(lambda t: t.pop("head/logits")), "head/logits is missing"),
    "misshapen": (
        tensors(lambda t: t.update(read=np.zeros((3, 6), np.float32))),
        "read has shape (3, 6)",
    ),
    "unknown setting": (setting("colour", 1), "setting colour is not known"),
    "missing setting": (edited(lambda s: s.pop("reads")), "setting reads is missing"),
    "format 2": (setting("format", 2), "format"),
    "format true": (setting("format", True), "format"),
    "reads": (setting("reads", "pictures"), "reads is 'pictures'"),
    "reads 3": (setting("reads", 3), "reads is 3"),
    "reads tokens": (setting("reads", "tokens"), "the head's width is 3"),
    "table": (setting("table", ["frozen"]), "table is"),
    "contrast": (setting("contrast", "much"), "contrast"),
    "contrast true": (setting("contrast", True), "contrast"),
    "contrast < 0": (setting("contrast", -1.0), "contrast is -1.0"),
    "contrast huge": (setting("contrast", 10**400), "contrast is for densities"),
    "contrast of vectors": (setting("contrast", 1.0), "contrast is for densities"),
    "head": (setting("head", "mixture"), "head must be an object"),
    "head's kind": (of_head("kind", "gauss"), "kind of head is 'gauss'"),
    "head's setting": (of_head("rank", 2), "no setting 'rank'"),
    "head's type": (of_head("components", "3"), "components"),
    "head's width": (of_head("width", 4), "has shape"),
    "head's huge width": (of_head("width", 10**12), "width"),
    "head's components": (of_head("components", 4), "has shape"),
    "head's depth": (of_head("depth", 2), "is missing"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_folders_are_refused(name, good, tmp_path):
    change, message = MALFORMED[name]
    folder = tmp_path / "made"
    shutil.copytree(good, folder)
    change(folder)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(clm.InputError) as refused:
        density.load(folder)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 600
    assert sorted(p.name for p in folder.iterdir()) == before


def test_refused_saves_leave_no_file(tmp_path):
    lm = build("gaussian")
    without = {k: v for k, v in lm.params.items() if k != "table"}
    with pytest.raises(clm.InputError, match="table is missing"):
        density.save(tmp_path / "a", dataclasses.replace(lm, params=without))
    with pytest.raises(clm.InputError, match="read is left over"):
        density.save(
            tmp_path / "a", dataclasses.replace(lm, params=lm.params | {"read": 0.0})
        )
    short = lm.params | {"table": lm.params["table"][:-1]}
    with pytest.raises(clm.InputError, match="table has shape"):
        density.save(tmp_path / "a", dataclasses.replace(lm, params=short))
    assert list(tmp_path.iterdir()) == []


@slow
def test_tied_token_heads_equal_the_language_model(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    head = heads.TokenHead(width=11, tied=True)
    lm = density.create(KEY, config, head)
    assert set(lm.params) == {"trunk"}
    tokens = sequence("tokens")[0]["tokens"]
    logits = Transformer(config).apply({"params": lm.params["trunk"]}, tokens[:-1])
    token_logits = density.token_logits(lm, tokens)
    np.testing.assert_allclose(token_logits, logits, rtol=1e-5, atol=1e-6)
    nats = -log_softmax(np.asarray(logits, np.float64), axis=-1)[
        np.arange(N - 1), tokens[1:]
    ]
    np.testing.assert_allclose(density.loss(lm, tokens), nats, rtol=1e-5)
    density.save(tmp_path, lm)
    back = density.load(tmp_path)
    assert back.model.head.tied
    expected = density.log_prob(lm, tokens)
    np.testing.assert_array_equal(density.log_prob(back, tokens), expected)
    np.testing.assert_allclose(
        clm.load(tmp_path)(tokens[:-1]), logits, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(clm.InputError, match="that model's own"):
        density.add_head(clm.load(tmp_path), head, key=KEY)
    with pytest.raises(clm.InputError, match="if it is tied"):
        head.distribution({}, np.zeros(6, np.float32))


UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
SOFTCAPPED = TransformerConfig(
    family="gemma2",
    vocab_size=11,
    hidden_size=6,
    mlp_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    norm="rms_plus_one",
    norm_eps=1e-6,
    post_norms=True,
    activation="gelu_tanh",
    logits_softcap=0.5,
    scale_embeddings=True,
    tie_embeddings=True,
)


@pytest.mark.parametrize("config", [UNTIED, SOFTCAPPED], ids=["untied", "softcapped"])
def test_a_tied_token_head_differs_from_a_trunk_with_other_logits(tmp_path, config):
    lm = density.create(KEY, config, heads.TokenHead(width=11, tied=True))
    larger = jax.tree.map(lambda leaf: 5.0 * leaf, lm.params)
    lm = lm.with_params(larger)
    tokens = sequence("tokens")[0]["tokens"]
    logits = density.token_logits(lm, tokens)
    trunk_logits = density.trunk_of(lm)(tokens[:-1])
    assert np.abs(logits - trunk_logits).max() > 0.1
    clm.save(tmp_path, lm)
    loaded = clm.load(tmp_path)
    np.testing.assert_array_equal(density.token_logits(loaded, tokens), logits)
    assert not lm.model.is_trunks_own
    on_trunk = density.add_head(density.trunk_of(lm), lm.model.head, key=KEY)
    np.testing.assert_array_equal(density.token_logits(on_trunk, tokens), logits)


# --- Pretrained trunks -----------------------------------------------------------------------


def check_on(lm, tokens, vectors_wide):
    head = heads.MixtureHead(width=vectors_wide, components=2, depth=1, mlp_size=8)
    density_lm = density.add_head(lm, head, key=KEY, token_loss_weight=0.1)
    assert density_lm.params["trunk"] is lm.params
    assert density_lm.model.table == "embedding"
    logs = density.log_prob(density_lm, tokens)
    assert logs.shape == (len(tokens) - 1,)
    assert np.isfinite(logs).all()
    rows = density.standardize_table(lm.params["embedding"])
    context = trunk_inputs.make_inputs(lm.config, tokens[:-1])
    hidden = transformer.hidden_states(lm.config, lm.params, context).hidden
    mixture = head.distribution(density_lm.params["head"], hidden)
    np.testing.assert_allclose(logs, mixture.log_prob(rows[tokens[1:]]), rtol=1e-3)


@slow
def test_density_head_on_the_bundled_model():
    lm = clm.load("apples", dtype="float32")
    tokens = np.array([1, 2, 3, 2, 5, 1])
    check_on(lm, tokens, lm.config.hidden_size)
    with pytest.raises(clm.InputError, match="the head's width is 5"):
        density.add_head(lm, heads.GaussianHead(width=5), key=KEY)


@slow
def test_density_head_on_the_stories_model():
    if not STORIES.exists():
        pytest.skip(
            f"the TinyStories weights are not at {STORIES.relative_to(STORIES.parents[3])}"
        )
    lm = clm.load(STORIES)
    tokens = np.array(clm.tokenization.encode(lm.tokenizer, "Once upon a time").ids)
    check_on(lm, tokens, lm.config.hidden_size)


# --- Arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_kind": "pictures"}, "input_kind is 'pictures'"),
        ({"table": "learned"}, "table is 'learned'"),
        ({"token_loss_weight": -1.0}, "token_loss_weight is -1.0"),
        ({"token_loss_weight": math.nan}, "token_loss_weight is nan"),
        ({"head": heads.GaussianHead(width=7)}, "the head's width is 7"),
        ({"head": heads.TokenHead(width=6)}, "vocab_size is 11"),
        ({"head": KINDS["token"], "token_loss_weight": 1.0}, "token_loss_weight"),
        ({"head": KINDS["token"], "input_kind": "vectors"}, "token head"),
        ({"input_kind": "vectors", "token_loss_weight": 1.0}, "token_loss_weight"),
    ],
)
def test_inconsistent_models_are_refused(arguments, message):
    with pytest.raises(clm.InputError) as refused:
        DensityModel(CONFIG, **{"head": KINDS["gaussian"], **arguments})
    assert message in str(refused.value)


def test_arguments_that_do_not_fit():
    tokens, vectors = np.arange(4), np.zeros((4, WIDTH), np.float32)
    lm, plain = build("gaussian"), build("gaussian", "vectors")
    log_prob, create = density.log_prob, density.create
    table = np.ones((11, 6))
    for call, message in {
        lambda: log_prob(lm): "reads tokens",
        lambda: log_prob(lm, vectors=vectors): "reads tokens",
        lambda: log_prob(lm, tokens, vectors=vectors): "reads tokens",
        lambda: log_prob(plain, tokens): "reads vectors",
        lambda: density.token_logits(plain, tokens): "reads vectors",
        lambda: log_prob(plain, vectors=np.zeros((4, 2))): "[..., T, 3]",
        lambda: log_prob(plain, vectors=vectors + np.nan): "vectors[0, 0] is nan",
        lambda: log_prob(lm, np.array([1, 11])): "tokens[1] is 11",
        lambda: log_prob(lm, tokens[:1]): "at least two",
        lambda: density.loss(plain, vectors=vectors[:1]): "at least two",
        lambda: density.token_logits(lm, tokens[:1]): "at least two",
        lambda: log_prob(lm, tokens, durations=np.ones(3)): "durations has shape",
        lambda: log_prob(lm, tokens, durations=-np.ones(4)): "durations[0] is -1",
        lambda: density.token_table(plain): "table of tokens",
        lambda: density.token_table(build("token")): "table of tokens",
        lambda: create(KEY, CONFIG, KINDS["gaussian"], table=table[:3]): "table",
        lambda: create(
            KEY, CONFIG, KINDS["gaussian"], table=table + np.nan
        ): "table[0, 0] is nan",
        lambda: create(
            KEY, CONFIG, KINDS["gaussian"], table=table, input_kind="vectors"
        ): "leave out table",
    }.items():
        with pytest.raises(clm.InputError) as refused:
            call()
        assert message in str(refused.value)
    with pytest.raises(TypeError):  # all vectors would be scored by the last state
        log_prob(lm, tokens, position=-1)


def test_other_kinds_of_models_are_refused(tmp_path):
    trunk = LanguageModel(Transformer(CONFIG), build("gaussian").params["trunk"])
    tokens = np.arange(4)
    for call in (
        lambda: density.log_prob(trunk, tokens),
        lambda: density.loss(trunk, tokens),
        lambda: density.token_logits(trunk, tokens),
        lambda: density.token_table(trunk),
        lambda: density.save(tmp_path / "made", trunk),
        lambda: density.steering_direction(trunk, [1]),
    ):
        with pytest.raises(
            clm.InputError, match=r"holds a Transformer, .* DensityModel"
        ):
            call()
    with pytest.raises(clm.InputError, match="holds a DensityModel"):
        density.add_head(build("gaussian"), KINDS["gaussian"], key=KEY)
    assert list(tmp_path.iterdir()) == []


# --- Parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reads"), [("token", "tokens"), ("mixture", "vectors")]
)
def test_init_of_linen_has_the_table_of_parameters(name, reads):
    lm, (inputs, _) = build(name, reads), sequence(reads)
    table = lm.model.parameter_table()
    boxes = jax.eval_shape(lambda: lm.model.init(KEY, **inputs))["params"]
    initial = {
        path: (box.names, box.value.shape) for path, box in flatten(boxes).items()
    }
    assert initial == {path: (d.axes, d.shape) for path, d in table.items()}
    assert ("read" in table) == (reads == "vectors")
    missing = {key: part for key, part in lm.params.items() if key != "head"}
    with pytest.raises(clm.InputError, match=r"parameter head/.* is missing"):
        lm.model.apply({"params": missing}, **inputs)
