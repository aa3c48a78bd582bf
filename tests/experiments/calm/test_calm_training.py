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

import continuous_lm as clm
from continuous_lm.experiments.calm import (
    calm_evaluation,
    calm_training,
    sample_calm,
    train_autoencoder,
    train_calm,
)
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import (
    code_comparison,
    density_training,
    sample_density,
    train_lm,
)
from continuous_lm.experiments.text_models import compare_quantizers, evaluate
from continuous_lm.experiments.training import run_folder, text
from continuous_lm.models import calm
from continuous_lm.models.calm import autoencoder
from tests.experiments.calm.test_calm_evaluation import returned
from tests.fixtures.programs import ENVIRONMENT
from tests.fixtures.text_programs import (
    NEW_VOCABULARY,
    SMALL_TRUNK,
    assert_refused,
    write_text,
)

KEY = jax.random.key(0)
slow = pytest.mark.slow

TRAINED = {"batch_size": 4, "save_every": 10}
CODEC = TRAINED | {
    "hidden_size": 16,
    "chunk_size": 2,
    "latent_size": 8,
    "steps": 450,
}
CODEC4 = CODEC | {"tokenizer": "codec", "chunk_size": 4, "steps": 22}
SHORT = TRAINED | SMALL_TRUNK | {"length": 16, "steps": 22}
HEAD = ("depth=1", "noise_size=8", "num_samples=2")

RUNS = {
    "codec": (train_autoencoder, CODEC | NEW_VOCABULARY),
    "codec4": (train_autoencoder, CODEC4),
    "baseline": (train_lm, SHORT | {"tokenizer": "codec"}),
    "energy": (train_calm, SHORT | {"codec": "codec", "head_settings": HEAD}),
    "flow": (
        train_calm,
        SHORT | {"codec": "codec4", "head": "flow", "head_settings": ("steps=2",)},
    ),
}


@pytest.fixture(autouse=True)
def in_the_folder(request, monkeypatch):
    """Programs run where the trained models are, if a test has any."""
    if "trained" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("trained"))


def run_training(module, flags):
    return module.run(module.Config(**flags, data=("text.txt",)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text, two autoencoders, a baseline, and next-vector models of K = 2 and 4."""
    folder = tmp_path_factory.mktemp("next_vector")
    write_text(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, (module, flags) in RUNS.items():
            run_training(module, flags | {"output_dir": name})
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
    assert [line["step"] for line in logged] == [*range(10, 451, 10)]
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
    target = returned(codec, chunks, latents)
    assert logged[-1]["reconstructed"] == pytest.approx(target, abs=1e-6)
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
        assert stored["run"]["flags"]["codec"] == {2: "codec", 4: "codec4"}[size]
    head = calm.load(trained / "energy").model.head
    assert (head.depth, head.noise_size, head.num_samples) == (1, 8, 2)


@slow
def test_evaluation_of_both_kinds_at_the_same_positions(trained):
    config = evaluate.Config(
        data=("text.txt",),
        length=16,
        context=8,
        stride=8,
        positions=20,
        models=("baseline", "energy", "flow"),
        output_dir="eval",
    )
    result = evaluate.run(config)
    stdout = result.summary()
    models = read(trained / "eval" / "evaluate.json")["models"]
    assert models == result.models
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
        actual["positions"]
        for numbers in models.values()
        for actual in numbers["brier"].values()
    }
    assert len(positions) == 1
    table = (trained / "eval" / "brier.csv").read_text().splitlines()
    assert len(table) == 1 + 3 + 2 + 2
    for number in ("brier_1", "brier_lm"):
        value = models["flow"]["brier"]["sampled"][number]["value"]
        assert f"{value:.{2 if number == 'brier_lm' else 4}f} (" in stdout
    # By hand, from the folder: the same draws at the same places.
    lm = density_training.load_text_model(str(trained / "energy"))
    held_out = tokens_of(trained, 1)
    actual = calm_evaluation.evaluate_brier_lm(
        lm, held_out, context=8, stride=8, limit=20
    )
    assert actual == models["energy"]["brier"]


@slow
def test_samples_and_what_lies_between(trained):
    between = ("Ann reads the file.", "Bob opens a path.")
    half = {"temperature": 0.5, "candidates": 20}
    runs = {
        "half": half,
        "again": half,
        "one": {"temperature": 1.0},
        "seed": {"temperature": 1.0, "seed": 1},
        "zero": {"temperature": 0.0, "candidates": 20},
        "exact": {"method": "exact", "temperature": 1.0},
        "between": {"between": between},
    }
    actual = {}
    for name, flags in runs.items():
        config = sample_calm.Config(
            **flags,
            model="energy",
            samples=3,
            max_new_tokens=5,
            prompt="Ann",
            output_dir=f"s/{name}",
        )
        summary = sample_calm.run(config).summary()
        actual[name] = read(trained / "s" / name / "sample.json")
        assert len(actual[name]["texts"]) == 3
        for draws in (*actual[name]["texts"], *actual[name].get("between", [])):
            assert draws in summary
    assert actual["half"]["texts"] == actual["again"]["texts"]
    assert actual["one"]["texts"] != actual["seed"]["texts"]
    lm = calm.load(trained / "energy")
    ends = [lm.tokenizer.encode(end).ids for end in between]
    assert actual["between"]["between"] == [
        lm.tokenizer.decode(row)
        for row in calm_evaluation.interpolate_texts(calm.autoencoder_of(lm), *ends)
    ]
    assert len(actual["between"]["between"]) == 5


@slow
def test_the_ablation_has_a_row_for_each_way_and_chunk_size(trained):
    config = compare_quantizers.Config(
        data=("text.txt",),
        model=("energy", "flow"),
        length=8,
        windows=16,
        codes=16,
        stages=2,
        output_dir="ablation",
    )
    stdout = compare_quantizers.run(config).summary()
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
        single = np.asarray(autoencoder.encode(codec, chunks)[0])
        assert named["decoder"]["kept"] == pytest.approx(
            returned(codec, chunks, single), abs=1e-6
        )
        reference = train[: len(train) // size * size].reshape(-1, size)
        latents = np.asarray(autoencoder.encode(codec, reference)[0])
        assert nearest == f"nearest of {len(latents)}"
        which = ((single[:, None] - latents) ** 2).sum(axis=-1).argmin(axis=1)
        target = returned(codec, chunks, latents[which])
        assert named[nearest]["kept"] == pytest.approx(target, abs=1e-6)
    lm = calm.load(trained / "energy")
    with pytest.raises(clm.InputError, match="--codes=100000, but there are"):
        code_comparison.compare_latent_quantizers(
            lm,
            train,
            held_out,
            code_comparison.Settings(
                length=4, windows=2, seed=0, codes=100_000, stages=2, levels=5
            ),
        )


# --- Runs that were stopped ------------------------------------------------------------------


@slow
@pytest.mark.parametrize("name", ["codec4", "energy"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(trained, name):
    load = {"codec4": autoencoder.load, "energy": calm.load}[name]
    module, flags = RUNS[name]
    flags = flags | {"output_dir": "stopped_" + name}
    run_training(module, flags)
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
    run_training(module, flags)
    assert_same_trees(load(folder).params, expected)
    assert (folder / "run" / "metrics.jsonl").read_text() == before
    flags = flags | {"data": ("text.txt",)}
    assert_refused(module, ["batch_size = 4, not 8"], **(flags | {"batch_size": 8}))
    if name == "energy":  # another autoencoder of the same sizes
        codec = autoencoder.load(trained / "codec")
        moved = codec.params | {"squeeze_bias": codec.params["squeeze_bias"] + 1}
        other = codec.with_params(moved)
        autoencoder.save(trained / "moved", other)
        assert_refused(module, ["frozen"], **(flags | {"codec": "moved"}))


# One process imports everything, and its forks run the training. A fork is killed a number of
# seconds after a new checkpoint, or after its start if there is no checkpoint to wait for.
_KILLER = """
import json, os, pathlib, runpy, signal, sys, time
import continuous_lm.experiments.calm.calm_training
import continuous_lm.experiments.common.program

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
    """SIGKILL once before the first step, then during steps and checkpoints."""
    steps = 1500
    flags = SHORT | {"data": "text.txt", "codec": "codec", "steps": steps}
    common = [f"--{name}={value}" for name, value in flags.items()]
    common.append(f"--head_settings={','.join(HEAD)}")
    full, killed = (trained / name for name in ("whole", "killed"))
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _KILLER, "train_calm"],
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
        assert call(full, None) == 0
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
    assert_same_trees(calm.load(full).params, calm.load(killed).params)
    assert (full / "model.safetensors").read_bytes() == (
        killed / "model.safetensors"
    ).read_bytes()
    assert metrics(full) == metrics(killed)


# --- Refused input ---------------------------------------------------------------------------

ON = SHORT | {"codec": "codec"}
REFUSED_CALM = {
    "no codec": ({"codec": None}, "--codec is missing"),
    "codec is nowhere": ({"codec": "nowhere"}, "nowhere"),
    "codec is a model": ({"codec": "energy"}, "this is no autoencoder"),
    "codec is a baseline": ({"codec": "baseline"}, "this is no autoencoder"),
    "codec is a text": ({"codec": "text.txt"}, "text.txt"),
    "gaussian": ({"head": "gaussian"}, "--head is 'gaussian'", "energy, flow"),
    "token": ({"head": "token"}, "--head is 'token'"),
    "setting": ({"head_settings": ("depths=1",)}, "no setting 'depths'"),
    "value": ({"head_settings": ("beta=2",)}, "beta is 2"),
    "samples": ({"head_settings": ("num_samples=1",)}, "num_samples is 1"),
    "width": ({"head_settings": ("width=3",)}, "--head_settings: width follows from"),
    "too long": ({"length": 2000}, "too short"),
    "channels": ({"num_heads": 3}, "3 heads do not share 16 channels"),
}
REFUSED_CODEC = {
    "unknown": ("width=3", "no setting 'width'"),
    "no value": ("dropout", "'dropout' is not name=value"),
    "a word": ("dropout=much", "dropout is 'much'", "float"),
    "a half": ("encoder_layers=2.5", "encoder_layers is 2.5"),
    "odd": ("decoder_layers=3", "num_decoder_layers is 3"),
    "dropout": ("dropout=1", "dropout is 1"),
    "activation": ("activation=tanh", "--codec_settings", "tanh"),
    "no layers": ("encoder_layers=-2", "encoder_layers is -2"),
    "eps": ("norm_eps=-1", "norm_eps is -1"),
    "size twice": ("latent_size=4", "latent_size is set by other flags"),
    "vocabulary": ("vocab_size=4", "vocab_size is set by other flags"),
    "chunk twice": ("chunk_size=4", "chunk_size is set by other flags"),
    "tokenizer": ("tokenizer=4", "tokenizer is set by other flags"),
}


@slow
@pytest.mark.parametrize("case", REFUSED_CALM)
def test_bad_input_to_the_training_of_next_vector_models(trained, tmp_path, case):
    changes, *culprits = REFUSED_CALM[case]
    flags = ON | {"data": ("text.txt",), "output_dir": tmp_path / "out"} | changes
    if "codec" in changes:
        culprits.append("--codec")
    assert_refused(train_calm, culprits, **flags)
    assert not list(tmp_path.glob("out/*.json"))


@pytest.mark.parametrize("case", [*REFUSED_CODEC, "too long"])
def test_bad_input_to_the_training_of_autoencoders(tmp_path, case):
    flags = CODEC | NEW_VOCABULARY | {"data": (write_text(tmp_path),)}
    if case == "too long":
        changes, culprits = {"chunk_size": 20_000}, ["too short"]
    else:
        setting, *culprits = REFUSED_CODEC[case]
        changes = {"codec_settings": (setting,)}
    flags |= {"output_dir": tmp_path / "out"} | changes
    assert_refused(train_autoencoder, culprits, **flags)
    assert not list(tmp_path.glob("out/*.json"))


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        (train_autoencoder, "chunk_size=0"),
        (train_autoencoder, "latent_size=0"),
        (train_calm, "head=none"),
    ],
)
def test_flags_out_of_range(module, flag):
    """Bounds of flags are checked when the config is made."""
    with pytest.raises(clm.InputError, match=flag.split("=")[0]):
        program.parse(module.Config, "program", [f"--{flag}"])


# Flags that have no meaning for a program: it does not have them.
ABSENT_FLAGS = {
    train_calm: "trunk table_from token_loss_weight chunk_size latent_size codec_settings"
    " tokenizer vocab_size stage",
    train_autoencoder: "head head_settings trunk table_from token_loss_weight num_layers"
    " num_heads length codec",
    sample_calm: "quantize towards away strengths near_k",
}


@pytest.mark.parametrize("module", ABSENT_FLAGS, ids=lambda m: m.__name__)
def test_programs_have_the_flags_that_they_read(module):
    for name in ABSENT_FLAGS[module].split():
        with pytest.raises(clm.InputError, match=f"'{name}'"):
            program.parse(module.Config, "program", [f"--{name}=1"])


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ({"between": ("Ann reads",)}, "--between is given 1 times; give it twice"),
        ({"between": ("Ann", "Bob", "Eve")}, "--between is given 3 times"),
        ({"method": "exact", "candidates": 3}, "--candidates is not of --method=exact"),
        ({"max_rounds": 3}, "--max_rounds is not of --method=batch"),
        ({"model": None}, "--model is missing"),
        ({"model": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_bad_flags_of_samples(flags, culprit):
    assert_refused(sample_calm, [culprit], **({"model": "energy"} | flags))


@slow
def test_bad_input_to_the_others(trained):
    data = {"data": ("text.txt",)}
    for flags, *culprits in (
        ({"models": ("codec",)}, "codec holds an autoencoder"),
        ({"models": ("energy", "energy")}, "two folders are called energy"),
        ({"models": ("energy",), "context": 100_000}, "energy", "too short"),
        ({"models": ("baseline",), "codec": "codec"}, "--codec", "density model"),
    ):
        assert_refused(evaluate, culprits, **data, **flags)
    texts = ("Ann reads the file.", "")
    for flags, *culprits in (
        ({"between": texts}, "--between", "a chunk"),
        ({"temperature": 0.7}, "temperature is 0.7", "1/n"),
        ({"temperature": 2.0, "method": "exact"}, "temperature is 2.0"),
        ({"temperature": 0.0, "method": "exact"}, "temperature is 0"),
        ({"temperature": 0.25, "candidates": 3}, "at least 4 candidates"),
        ({"model": "baseline"}, "baseline holds no next-vector model"),
        ({"model": "codec"}, "codec holds an autoencoder"),
    ):
        assert_refused(sample_calm, culprits, **({"model": "energy"} | flags))
    assert_refused(sample_density, ["holds a next-vector model"], model="energy")
    for flags, *culprits in (
        ({"candidates": 3}, "--candidates", "has no rows"),
        (
            {"model": ("energy", "baseline")},
            "baseline is a density model; give it alone",
        ),
        ({"codes": 100_000}, "--codes=100000"),
        ({"length": 100_000}, "too short"),
    ):
        flags = data | {"model": ("energy",), "output_dir": "refused"} | flags
        assert_refused(compare_quantizers, culprits, **flags)
    assert not list((trained / "refused").glob("*"))
