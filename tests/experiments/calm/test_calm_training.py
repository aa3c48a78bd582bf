"""Next-vector models in the programs of text models, and what these stand on."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.densities import code_comparison, density_training
from continuous_lm.experiments.training import run_folder, text
from continuous_lm.models import calm
from continuous_lm.models.calm import autoencoder
from tests.experiments.text_models.test_text_models import (
    NEW,
    assert_refused,
    run,
    write_text,
)
from tests.fixtures import tiny
from tests.fixtures.programs import ENVIRONMENT, forked_runner

KEY = jax.random.key(0)
V = tiny.CODEC_CONFIG.vocab_size
slow = pytest.mark.slow


# --- Positions -------------------------------------------------------------------------------


@given(
    length=st.integers(12, 300),
    context=st.integers(1, 8),
    stride=st.integers(1, 20),
    limit=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_positions_are_places_of_the_text(length, context, stride, limit, seed):
    """Tokens that are their own indices say where each row is from."""
    options = dict(context=context, stride=stride, limit=limit, seed=seed)
    contexts, references, groups = calm_training.evaluation_positions(
        np.arange(length), **options
    )
    begins = contexts[:, 0]
    np.testing.assert_array_equal(contexts, begins[:, None] + np.arange(context))
    np.testing.assert_array_equal(references, begins[:, None] + context + np.arange(4))
    assert references.max() < length
    there = range(0, length - context - 4 + 1, stride)
    assert len(set(begins)) == len(begins) == min(limit, len(there))
    assert set(begins) <= set(there)
    if limit >= 2 and len(begins) < len(there):  # spread over the text
        assert np.ptp(begins) >= 0.4 * (length - context - 4 - stride)
    if stride >= 4:
        assert len(np.unique(references)) == references.size  # no token is judged twice
    # Positions in one group are near, and contexts of any that are not neighbours share nothing.
    np.testing.assert_array_equal(groups, begins // (context + 4))
    for contexts_of, number in (
        (contexts[groups == g], g) for g in set(groups.tolist())
    ):
        assert np.ptp(contexts_of[:, 0]) < context + 4, number
    again = calm_training.evaluation_positions(np.arange(length), **options)
    for a, b in zip(again, (contexts, references, groups), strict=True):
        np.testing.assert_array_equal(a, b)


def test_positions_come_in_an_order_of_chance():
    """Which seeds change, as they do not change the places."""
    options = dict(context=4, stride=4, limit=50)
    first, second = (
        calm_training.evaluation_positions(np.arange(400), **options, seed=seed)[0][
            :, 0
        ]
        for seed in (0, 1)
    )
    assert sorted(first) == sorted(second)
    assert (first != second).mean() > 0.8
    assert (np.diff(first) < 0).any()


def test_a_text_without_a_position_is_refused():
    options = dict(context=8, stride=1, limit=4)
    with pytest.raises(clm.InputError, match="the held-out data is too short"):
        calm_training.evaluation_positions(np.arange(11), **options)
    assert calm_training.evaluation_positions(np.arange(12), **options)[0].shape == (
        1,
        8,
    )


# --- The autoencoder -------------------------------------------------------------------------


def returned(codec, chunks, latents):
    """The share of the chunks' tokens that their latents are decoded to."""
    return float(
        np.mean(np.argmax(autoencoder.decode(codec, latents), axis=-1) == chunks)
    )


def test_reconstruction_is_the_mean_over_all_chunks():
    """Of an untrained autoencoder; the rest of a chunk at the end is left out."""
    codec, tokens = (
        calm.autoencoder_of(tiny.next_vector_lm()),
        np.random.default_rng(0).integers(0, V, 602),
    )
    found = calm_training.reconstruction_shares(codec, tokens)
    assert list(found) == ["mean", "sampled", "noisy"]
    assert all(0 <= share <= 1 for share in found.values())
    assert len(set(found.values())) == 3
    chunks = tokens[:600].reshape(-1, 3)
    mean, log_scale = autoencoder.encode(codec, chunks)
    assert found["mean"] == pytest.approx(returned(codec, chunks, mean), abs=1e-6)
    # Noise of variance 1 and of variance 2, of the posterior's scale, from the same draws.
    noise = jnp.exp(log_scale) * jax.random.normal(
        jax.random.fold_in(KEY, 0), mean.shape
    )
    for name, factor in (("sampled", 1.0), ("noisy", 2**0.5)):
        wanted = returned(codec, chunks, mean + factor * noise)
        assert found[name] == pytest.approx(wanted, abs=2e-3)
    assert (
        calm_training.reconstruction_shares(codec, tokens, seed=1)["sampled"]
        != found["sampled"]
    )
    assert calm_training.reconstruction_shares(codec, tokens[:600]) == found


@slow
def test_reconstruction_of_many_chunks_counts_each_of_them_once():
    """In parts of unequal sizes."""
    codec, tokens = (
        calm.autoencoder_of(tiny.next_vector_lm()),
        np.random.default_rng(0).integers(0, V, 3 * 4101),
    )
    tokens[: 3 * 2000] = 0
    chunks = tokens.reshape(-1, 3)
    found = calm_training.reconstruction_shares(codec, tokens)["mean"]
    assert found == pytest.approx(
        returned(codec, chunks, autoencoder.encode(codec, chunks)[0]), abs=1e-6
    )


def test_reconstruction_of_less_than_a_chunk_is_refused():
    with pytest.raises(clm.InputError, match="too short"):
        calm_training.reconstruction_shares(
            calm.autoencoder_of(tiny.next_vector_lm()), np.arange(2)
        )


def test_between_two_texts():
    """Both ends are what their own latents decode to; what is longer is cut to whole chunks."""
    codec, rng = calm.autoencoder_of(tiny.next_vector_lm()), np.random.default_rng(1)
    first, second = rng.integers(0, V, 11).tolist(), rng.integers(0, V, 8).tolist()
    rows = calm_training.interpolate_texts(codec, first, second, num_points=7)
    assert [len(row) for row in rows] == [6] * 7
    for row, tokens in ((rows[0], first), (rows[-1], second)):
        decoded = autoencoder.decode(
            codec, autoencoder.encode(codec, np.reshape(tokens[:6], (2, 3)))[0]
        )
        assert row == np.argmax(decoded, axis=-1).ravel().tolist()
    assert rows[0] != rows[-1]
    assert (
        calm_training.interpolate_texts(codec, second, first, num_points=7)
        == rows[::-1]
    )
    ends = [
        autoencoder.encode(codec, np.reshape(tokens[:6], (2, 3)))[0]
        for tokens in (first, second)
    ]
    middle = (
        np.argmax(autoencoder.decode(codec, (ends[0] + ends[1]) / 2), axis=-1)
        .ravel()
        .tolist()
    )
    assert rows[3] == middle
    with pytest.raises(clm.InputError, match="less than the 3 tokens of a chunk"):
        calm_training.interpolate_texts(codec, first, [1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(width=3), "no setting 'width'; it has vocab_size"),
        (dict(dropout="much"), "dropout is 'much'; it must be float"),
        (dict(encoder_layers=2.0), "encoder_layers is 2.0; it must be int"),
        (dict(encoder_layers=True), "encoder_layers is True; it must be int"),
        (dict(encoder_layers=3), "num_encoder_layers is 3; it must be even"),
        (dict(dropout=1), "ae_dropout is 1"),
        (dict(activation=1), "activation is 1; it must be str"),
        (dict(latent_size=None), "latent_size is None; it must be int"),
        (dict(mlp_size="wide"), "mlp_size is 'wide'; it must be int"),
        (
            dict(encoder_layers=0),
            "num_encoder_layers is 0; it must be an integer from 1",
        ),
        (dict(decoder_layers=-2), "num_decoder_layers is -2"),
        (dict(norm_eps=0.0), "norm_eps is 0.0"),
        (dict(activation="tanh"), "'tanh'"),
    ],
    ids=str,
)
def test_settings_of_an_autoencoder_are_checked(settings, message):
    given = dict(vocab_size=10, hidden_size=8, chunk_size=3, latent_size=4) | settings
    with pytest.raises(clm.InputError, match=message):
        calm_training.create_codec(KEY, **given)


# --- Continuations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=slow) for size in (1, 4, 8))]
)
def test_continuations_have_4_tokens_whatever_a_chunk_has(size):
    """Those of a loop of single batches, the last of which is filled up."""
    lm, rng = tiny.next_vector_lm(chunk_size=size), np.random.default_rng(0)
    contexts = rng.integers(0, V, (5, 8))
    first, second = calm_training.draw_continuations(lm, contexts, KEY, batch_size=2)
    for made in (first, second):
        assert made.shape == (5, 4)
        assert made.dtype.kind == "i"
        assert (made >= 0).all()
        assert (made < V).all()
    assert (first != second).any()
    for i in (0, 2, 4):
        picked = contexts[np.minimum([i, i + 1], 4)]
        new = calm.sample(
            lm,
            np.concatenate([picked, picked]),
            max_new_tokens=4,
            key=jax.random.fold_in(KEY, i),
            stop=(),
        ).tokens
        count = min(2, 5 - i)
        np.testing.assert_array_equal(first[i : i + 2], new[:count])
        np.testing.assert_array_equal(second[i : i + 2], new[2 : 2 + count])


# --- The programs ----------------------------------------------------------------------------

DATA = "--data=text.txt"
TRAINED = ("--hidden_size=16", "--batch_size=4", "--save_every=10")
CODEC = (
    "--stage=autoencoder",
    *TRAINED,
    "--chunk_size=2",
    "--latent_size=8",
    "--steps=300",
)
TRUNK = ("--num_layers=1", "--num_heads=2", "--length=16")
STAGE = ("--stage=calm", *TRAINED, *TRUNK)
SHORT = "--steps=22"
HEAD = "--head_settings=depth=1,noise_size=8,num_samples=2"

RUNS = {
    "codec": (*CODEC, NEW),
    "codec4": (*CODEC, "--tokenizer=codec", "--chunk_size=4", SHORT),
    "baseline": ("--stage=baseline", *TRAINED, *TRUNK, "--tokenizer=codec", SHORT),
    "energy": (*STAGE, "--codec=codec", HEAD, SHORT),
    "flow": (*STAGE, "--codec=codec4", "--head=flow", "--head_settings=steps=2", SHORT),
}


@pytest.fixture(scope="module")
def train():
    with forked_runner("train") as train:
        yield train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A folder with a text, two autoencoders, a baseline, and next-vector models of K = 2 and 4."""
    folder = tmp_path_factory.mktemp("next_vector")
    write_text(folder)
    for name, arguments in RUNS.items():
        status, _, stderr = train(folder, DATA, *arguments, f"--output_dir={name}")
        assert status == 0, stderr
    return folder


def read(path):
    return json.loads(path.read_text())


def metrics(folder):
    return [
        json.loads(line)
        for line in (folder / "run" / "metrics.jsonl").read_text().split("\n")[:-1]
    ]


def assert_same_trees(first, second):
    first, second = map(run_folder.leaves_by_path, (first, second))
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)


def tokens_of(folder, part):
    """The text's tokens: part 0 is trained on, and part 1 held out."""
    tokenizer = autoencoder.load(folder / "codec").tokenizer
    documents = text.read_text_files([str(folder / "text.txt")]).documents
    return text.encode_documents(tokenizer, text.split_held_out(documents)[part])


@slow
def test_what_is_trained_is_whole(trained):
    codec = autoencoder.load(trained / "codec")
    assert codec.model.config.chunk_size == 2
    assert codec.model.config.latent_size == 8
    assert codec.model.config.vocab_size == codec.tokenizer.get_vocab_size() == 280
    logged = metrics(trained / "codec")
    assert [line["step"] for line in logged] == [*range(10, 301, 10)]
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert logged[0]["reconstructed"] < 0.2
    assert logged[-1]["reconstructed"] > 0.9
    # What came back last, by hand: of draws for the held-out windows, which share their ends.
    tokens = tokens_of(trained, 1)
    windows = np.stack([tokens[i : i + 64] for i in range(0, len(tokens) - 63, 63)])
    assert len(windows) <= calm_training.NUM_LOSS_WINDOWS
    chunks = windows.reshape(-1, 2)
    mean, log_scale = autoencoder.encode(codec, chunks)
    latents = mean + jnp.exp(log_scale) * jax.random.normal(KEY, mean.shape)
    wanted = returned(codec, chunks, latents)
    assert logged[-1]["reconstructed"] == pytest.approx(wanted, abs=1e-6)
    for name, size, kind in (("energy", 2, "EnergyHead"), ("flow", 4, "FlowHead")):
        lm = calm.load(trained / name)
        assert lm.model.chunk_size == size
        assert type(lm.model.head).__name__ == kind
        assert lm.tokenizer.to_str() == codec.tokenizer.to_str()
        of = autoencoder.load(trained / {2: "codec", 4: "codec4"}[size])
        assert_same_trees(lm.params["autoencoder"], of.params)  # it stayed as it was
        assert np.isfinite([line["loss"] for line in metrics(trained / name)]).all()
        assert metrics(trained / name)[-1]["held_out"] > 0
        stored = read(trained / name / "train.json")
        assert stored["data"]["bytes"] == (trained / "text.txt").stat().st_size
        assert stored["run"]["flags"]["stage"] == "calm"
    head = calm.load(trained / "energy").model.head
    assert (head.depth, head.noise_size, head.num_samples) == (1, 8, 2)


@slow
def test_evaluation_of_both_kinds_at_the_same_positions(trained):
    options = ("--length=16", "--context=8", "--stride=8", "--positions=20")
    status, stdout, stderr = run(
        trained,
        "evaluate",
        DATA,
        *options,
        "--models=baseline,energy,flow",
        "--output_dir=eval",
    )
    assert status == 0, stderr
    models = read(trained / "eval" / "evaluate.json")["models"]
    assert models["baseline"]["perplexity"]["value"] > 1
    assert list(models["baseline"]["brier"]) == ["sampled", "shuffled", "closed"]
    for name, size in (("energy", 2), ("flow", 4)):
        assert models[name]["chunk_size"] == size
        assert list(models[name]["brier"]) == ["sampled", "shuffled"]
        shares = models[name]["reconstruction"]
        assert all(0 <= share <= 1 for share in shares.values())
    trunk = calm.load(trained / "energy").params
    learned = sum(
        leaf.size
        for part, tree in trunk.items()
        if part != "autoencoder"
        for leaf in jax.tree.leaves(tree)
    )
    assert models["energy"]["parameters"] == learned
    positions = {
        found["positions"]
        for numbers in models.values()
        for found in numbers["brier"].values()
    }
    assert len(positions) == 1
    table = (trained / "eval" / "brier.csv").read_text().splitlines()
    assert len(table) == 1 + 3 + 2 + 2
    for number in ("brier_1", "brier_lm"):
        value = models["flow"]["brier"]["sampled"][number]["value"]
        assert f"{value:.{2 if number == 'brier_lm' else 4}f} (" in stdout
    # By hand, from the folder: the same draws at the same places.
    lm = density_training.load_text_model(trained / "energy")
    held_out = tokens_of(trained, 1)
    found = calm_training.evaluate_brier_lm(lm, held_out, context=8, stride=8, limit=20)
    assert found == models["energy"]["brier"]


@slow
def test_samples_and_what_lies_between(trained):
    common = ("--model=energy", "--samples=3", "--max_new_tokens=5", "--prompt=Ann")
    runs = {
        "half": ("--temperature=0.5", "--candidates=20"),
        "again": ("--temperature=0.5", "--candidates=20"),
        "seed": ("--temperature=0.5", "--candidates=20", "--seed=1"),
        "zero": ("--temperature=0", "--candidates=20"),
        "exact": ("--method=exact", "--temperature=1"),
        "between": ("--between=Ann reads the file.", "--between=Bob opens a path."),
    }
    found = {}
    with forked_runner("sample") as sample:
        for name, arguments in runs.items():
            status, stdout, stderr = sample(
                trained, *common, *arguments, f"--output_dir=s/{name}"
            )
            assert status == 0, stderr
            found[name] = read(trained / "s" / name / "sample.json")
            assert len(found[name]["texts"]) == 3
            for text in (*found[name]["texts"], *found[name].get("between", [])):
                assert text in stdout
    assert found["half"]["texts"] == found["again"]["texts"] != found["seed"]["texts"]
    between = found["between"]["between"]
    lm = calm.load(trained / "energy")
    ends = [lm.tokenizer.encode(text.split("=", 1)[1]).ids for text in runs["between"]]
    assert between == [
        lm.tokenizer.decode(row)
        for row in calm_training.interpolate_texts(calm.autoencoder_of(lm), *ends)
    ]
    assert len(between) == 5


@slow
def test_the_ablation_has_a_row_for_each_way_and_chunk_size(trained):
    options = (
        "--length=8",
        "--windows=16",
        "--codes=16",
        "--stages=2",
        "--output_dir=ablation",
    )
    status, stdout, stderr = run(
        trained, "compare_quantizers", DATA, "--model=energy,flow", *options
    )
    assert status == 0, stderr
    ways = read(trained / "ablation" / "compare_quantizers.json")["ways"]
    train, held_out = (tokens_of(trained, part) for part in (0, 1))
    assert [way["K"] for way in ways] == [2] * 5 + [4] * 5
    for size in (2, 4):
        named = {way["way"]: way for way in ways if way["K"] == size}
        nearest = next(name for name in named if name.startswith("nearest of "))
        assert list(named)[:3] == ["decoder", nearest, "VQ, 16"]
        assert named["decoder"]["noise"] == 0
        if size == 2:  # the autoencoder that has learned something
            assert (
                named["decoder"]["kept"]
                >= max(way["kept"] for way in named.values()) - 0.02
            )
        # No code is nearer than a latent of the training text, but where it is one of few.
        assert named[nearest]["noise"] <= 1.001 * named["VQ, 16"]["noise"]
        for way in named.values():
            assert 0 <= way["accuracy"] <= 1
            assert 0 <= way["kept"] <= 1
            assert way["way"] in stdout
        # By hand: 16 windows of 8 tokens that share their ends, without their first chunks.
        codec = autoencoder.load(trained / {2: "codec", 4: "codec4"}[size])
        begins = np.arange(16) * ((len(held_out) - 1) // 7) // 16 * 7
        chunks = held_out[begins[:, None] + np.arange(size, 8)].reshape(-1, size)
        own = np.asarray(autoencoder.encode(codec, chunks)[0])
        assert named["decoder"]["kept"] == pytest.approx(
            returned(codec, chunks, own), abs=1e-6
        )
        known = train[: len(train) // size * size].reshape(-1, size)
        latents = np.asarray(autoencoder.encode(codec, known)[0])
        assert nearest == f"nearest of {len(latents)}"
        which = ((own[:, None] - latents) ** 2).sum(axis=-1).argmin(axis=1)
        wanted = returned(codec, chunks, latents[which])
        assert named[nearest]["kept"] == pytest.approx(wanted, abs=1e-6)
    lm = calm.load(trained / "energy")
    with pytest.raises(clm.InputError, match="--codes=100000, but there are"):
        code_comparison.compare_latent_quantizers(
            lm,
            train,
            held_out,
            length=4,
            windows=2,
            seed=0,
            codes=100_000,
            stages=2,
            levels=5,
        )


# --- Runs that were stopped ------------------------------------------------------------------


@slow
@pytest.mark.parametrize("name", ["codec4", "energy"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(trained, train, name):
    load = {"codec4": autoencoder.load, "energy": calm.load}[name]
    arguments = (DATA, *RUNS[name], "--output_dir=stopped_" + name)
    assert train(trained, *arguments)[0] == 0
    folder = trained / ("stopped_" + name)
    expected = load(folder).params
    assert_same_trees(
        load(trained / name).params, expected
    )  # nothing is left to chance
    steps = [step for step, _ in run_folder.list_checkpoints(folder / "run")]
    assert steps == [20, 22]
    before = (folder / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(folder / "run" / "checkpoints" / "00000022")  # as if killed before
    for path in folder.glob("*.*"):
        path.unlink()
    assert train(trained, *arguments)[0] == 0
    assert_same_trees(load(folder).params, expected)
    assert (folder / "run" / "metrics.jsonl").read_text() == before
    outcome = train(trained, *arguments, "--batch_size=8")
    assert_refused(outcome, "batch_size = 4, not 8")
    if name == "energy":  # another autoencoder of the same sizes
        codec = autoencoder.load(trained / "codec")
        moved = codec.params | {"squeeze_bias": codec.params["squeeze_bias"] + 1}
        other = codec.with_params(moved)
        autoencoder.save(trained / "moved", other)
        assert_refused(train(trained, *arguments, "--codec=moved"), "frozen")


# Forks of one process that has imported everything run train, and may be killed: so many
# seconds after a new checkpoint, or after they began where there is none to wait for.
_KILLER = """
import json, os, pathlib, runpy, signal, sys, time
import continuous_lm.experiments.calm.calm_training
import continuous_lm.experiments.common.absl_program

program = sys.argv[1]
for line in sys.stdin:
    seconds, saved, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv = ["continuous_lm", program, *arguments]
        runpy.run_module("continuous_lm", run_name="__main__", alter_sys=True)
        os._exit(0)
    listed = lambda: os.listdir(saved) if saved is not None and os.path.isdir(saved) else []
    latest = lambda: max([int(name) for name in listed() if name.isdigit()], default=0)
    before, begin, ended = latest(), None if saved is not None else time.monotonic(), 0
    while not ended:
        if begin is None and latest() > before:
            begin = time.monotonic()
        ended, status = os.waitpid(child, os.WNOHANG)
        due = seconds is not None and begin is not None and time.monotonic() > begin + seconds
        if not ended and due:
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        time.sleep(0.002)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
KILLS = 5


@slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(trained):
    """By SIGKILL: once before its first step, then amid steps and checkpoints."""
    steps = 1500
    common = [DATA, *STAGE, "--codec=codec", HEAD, f"--steps={steps}"]
    whole, killed = (trained / name for name in ("whole", "killed"))
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _KILLER, "train"],
        cwd=trained,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(folder, seconds, saved=None):
        job = [seconds, saved and str(saved), *common, f"--output_dir={folder.name}"]
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    rng, reached = random.Random(time.time_ns()), []
    with server:
        assert call(whole, None) == 0
        assert call(killed, rng.uniform(0, 3)) == -signal.SIGKILL
        for _ in range(4 * KILLS):
            if len(reached) == KILLS - 1:
                break
            saved = killed / "run" / run_folder.CHECKPOINTS_FOLDER
            status = call(killed, rng.uniform(0, 0.4), saved)
            if status == 0:  # too late: once more
                shutil.rmtree(killed)
                reached.clear()
            else:
                assert status == -signal.SIGKILL  # and not ended by an error of its own
                there = [
                    step for step, _ in run_folder.list_checkpoints(killed / "run")
                ]
                reached.append(max(there, default=0))
        assert len(reached) == KILLS - 1
        assert call(killed, None) == 0
        server.stdin.close()
    assert 0 < reached[0] < reached[-1] < steps  # it went on from checkpoints
    assert_same_trees(calm.load(whole).params, calm.load(killed).params)
    assert (whole / "model.safetensors").read_bytes() == (
        killed / "model.safetensors"
    ).read_bytes()
    assert metrics(whole) == metrics(killed)


# --- What is refused -------------------------------------------------------------------------

ON = (*STAGE, "--codec=codec", SHORT)
PLAIN = (*CODEC, NEW)
REFUSED = {
    "no codec": ([*STAGE], "--codec is missing"),
    "codec is nowhere": ([*STAGE, "--codec=nowhere"], "--codec", "nowhere"),
    "codec is a model": (
        [*STAGE, "--codec=energy"],
        "--codec",
        "this is no autoencoder",
    ),
    "codec is a baseline": (
        [*STAGE, "--codec=baseline"],
        "--codec",
        "this is no autoencoder",
    ),
    "codec is a text": ([*STAGE, "--codec=text.txt"], "--codec", "text.txt"),
    "calm, gaussian": (
        [*ON, "--head=gaussian"],
        "--head=gaussian",
        "energy, flow, diffusion",
    ),
    "calm, token": ([*ON, "--head=token"], "--head=token", "--stage=calm"),
    "calm, trunk": ([*ON, "--trunk=baseline"], "--trunk", "is new"),
    "calm, rows": ([*ON, "--table_from=baseline"], "--table_from", "is new"),
    "calm, contrast": (
        [*ON, "--token_loss_weight=0.5"],
        "--token_loss_weight",
        "is new",
    ),
    "calm, chunks": ([*ON, "--chunk_size=2"], "--chunk_size", "its autoencoder"),
    "calm, latents": ([*ON, "--latent_size=8"], "--latent_size", "its autoencoder"),
    "calm, codec's": (
        [*ON, "--codec_settings=dropout=0"],
        "--codec_settings",
        "its autoencoder",
    ),
    "calm, tokenizer": ([*ON, "--tokenizer=codec"], "--tokenizer", "its own tokenizer"),
    "calm, vocabulary": ([*ON, NEW], "--vocab_size", "its own tokenizer"),
    "calm, setting": ([*ON, "--head_settings=depths=1"], "no setting 'depths'"),
    "calm, value": ([*ON, "--head_settings=beta=2"], "beta is 2"),
    "calm, samples": ([*ON, "--head_settings=num_samples=1"], "num_samples is 1"),
    "calm, width": (
        [*ON, "--head_settings=width=3"],
        "--head_settings: width follows from",
    ),
    "calm, too long": ([*ON, "--length=2000"], "too short"),
    "calm, channels": ([*ON, "--num_heads=3"], "3 heads do not share 16 channels"),
    "codec, head": ([*PLAIN, "--head=gaussian"], "--head", "an autoencoder has none"),
    "codec, implicit head": ([*PLAIN, "--head=energy"], "--head"),
    "codec, settings of a head": (
        [*PLAIN, "--head_settings=depth=1"],
        "--head_settings",
        "none",
    ),
    "codec, trunk": ([*PLAIN, "--trunk=baseline"], "--trunk", "none"),
    "codec, rows": ([*PLAIN, "--table_from=baseline"], "--table_from", "none"),
    "codec, contrast": (
        [*PLAIN, "--token_loss_weight=1"],
        "--token_loss_weight",
        "none",
    ),
    "codec, layers": ([*PLAIN, "--num_layers=2"], "--num_layers", "none"),
    "codec, heads": ([*PLAIN, "--num_heads=2"], "--num_heads", "none"),
    "codec, length": ([*PLAIN, "--length=2"], "--length", "none"),
    "codec, codec": ([*PLAIN, "--codec=codec"], "--codec", "none"),
    "codec, unknown": ([*PLAIN, "--codec_settings=width=3"], "no setting 'width'"),
    "codec, no value": (
        [*PLAIN, "--codec_settings=dropout"],
        "'dropout' is not name=value",
    ),
    "codec, a word": (
        [*PLAIN, "--codec_settings=dropout=much"],
        "dropout is 'much'",
        "float",
    ),
    "codec, a half": (
        [*PLAIN, "--codec_settings=encoder_layers=2.5"],
        "encoder_layers is 2.5",
    ),
    "codec, odd": (
        [*PLAIN, "--codec_settings=decoder_layers=3"],
        "num_decoder_layers is 3",
    ),
    "codec, dropout": ([*PLAIN, "--codec_settings=dropout=1"], "dropout is 1"),
    "codec, activation": (
        [*PLAIN, "--codec_settings=activation=tanh"],
        "--codec_settings",
        "tanh",
    ),
    "codec, no layers": (
        [*PLAIN, "--codec_settings=encoder_layers=-2"],
        "encoder_layers is -2",
    ),
    "codec, eps": ([*PLAIN, "--codec_settings=norm_eps=-1"], "norm_eps is -1"),
    "codec, size twice": ([*PLAIN, "--codec_settings=latent_size=4"], "latent_size"),
    "codec, vocabulary": ([*PLAIN, "--codec_settings=vocab_size=4"], "vocab_size"),
    "codec, chunk twice": ([*PLAIN, "--codec_settings=chunk_size=4"], "chunk_size"),
    "codec, tokenizer": ([*PLAIN, "--codec_settings=tokenizer=4"], "tokenizer"),
    "codec, too long": ([*PLAIN, "--chunk_size=20000"], "too short"),
    "density, codec": (["--codec=codec", NEW], "--codec", "only an autoencoder"),
    "density, chunks": (["--chunk_size=2", NEW], "--chunk_size", "only an autoencoder"),
    "density, latents": (
        ["--latent_size=2", NEW],
        "--latent_size",
        "only an autoencoder",
    ),
    "density, energy": (["--head=energy", NEW], "--head=energy", "--stage=density"),
    "baseline, codec": (
        ["--stage=baseline", "--codec=codec"],
        "--codec",
        "only an autoencoder",
    ),
    "baseline, head": (
        ["--stage=baseline", "--head=mixture"],
        "--head=mixture",
        "has token",
    ),
    "baseline, rows": (
        ["--stage=baseline", "--table_from=baseline"],
        "--table_from",
        "no rows",
    ),
    "baseline, setting": (
        ["--stage=baseline", "--codec_settings=dropout=0"],
        "--codec_settings",
        "only an autoencoder",
    ),
}


@slow
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_to_training(trained, train, tmp_path, case):
    arguments, *culprits = REFUSED[case]
    outcome = train(trained, DATA, *arguments, f"--output_dir={tmp_path / 'out'}")
    assert_refused(outcome, *culprits)
    assert not list(tmp_path.glob("out/*.json"))


@slow
@pytest.mark.parametrize(
    "arguments",
    [(*PLAIN, "--chunk_size=0"), (*PLAIN, "--latent_size=0"), (*ON, "--stage=flow")],
)
def test_flags_out_of_range(trained, train, arguments):
    """Which the flags themselves refuse."""
    status, _, stderr = train(trained, DATA, *arguments, "--output_dir=out_of_range")
    assert status != 0
    assert arguments[-1].split("=")[0].strip("-") in stderr
    assert "Traceback" not in stderr
    assert not (trained / "out_of_range").exists()


@slow
def test_bad_input_to_the_others(trained):
    models, other = "--models=codec", ("--model=energy", "--output_dir=refused")
    assert_refused(run(trained, "evaluate", models, DATA), "codec holds an autoencoder")
    assert_refused(
        run(trained, "evaluate", "--models=energy,energy", DATA),
        "two folders are called energy",
    )
    assert_refused(
        run(trained, "evaluate", "--models=energy", DATA, "--context=100000"),
        "energy",
        "too short",
    )
    with forked_runner("sample") as sample:
        for arguments, *culprits in (
            (["--between=Ann reads"], "--between is given 1 times; give it twice"),
            (
                ["--between=Ann", "--between=Bob", "--between=Eve"],
                "--between is given 3 times",
            ),
            (["--between=Ann reads the file.", "--between="], "--between", "a chunk"),
            (["--towards=file"], "--towards is not for a next-vector model"),
            (["--quantize=cosine"], "--quantize is not for a next-vector model"),
            (["--near_k=3"], "--near_k is not for a next-vector model"),
            (["--temperature=0.7"], "temperature is 0.7", "1/n"),
            (["--temperature=2", "--method=exact"], "temperature is 2.0"),
            (["--temperature=0", "--method=exact"], "temperature is 0"),
            (["--temperature=0.25", "--candidates=3"], "at least 4 candidates"),
            (
                ["--model=baseline", "--method=exact"],
                "--method is not for a density model",
            ),
            (
                ["--model=baseline", "--between=Ann"],
                "--between is not for a density model",
            ),
            (["--model=codec"], "codec holds an autoencoder"),
        ):
            assert_refused(sample(trained, *other, *arguments), *culprits)
    with forked_runner("compare_quantizers") as ablate:
        for arguments, *culprits in (
            (["--candidates=3"], "--candidates", "has no rows"),
            (["--model=energy,baseline"], "baseline is a density model; give it alone"),
            (["--codes=100000"], "--codes=100000"),
            (["--length=100000"], "too short"),
        ):
            assert_refused(ablate(trained, DATA, *other, *arguments), *culprits)
    assert not list((trained / "refused").glob("*"))
