"""Published next-vector models, against the same in plain PyTorch (`calm_reference`)."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import losses
from tests.fixtures import tiny
from tests.fixtures.params import assert_same_params

torch = pytest.importorskip("torch", reason="the reference is written in PyTorch")
pytest.importorskip(
    "transformers", reason="the reference's trunk is transformers' Llama"
)

from continuous_lm.models import calm  # noqa: E402
from continuous_lm.models.calm import autoencoder  # noqa: E402
from tests.fixtures import calm_reference as reference  # noqa: E402

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
PATCH, VOCABULARY = 4, 40
CHUNKS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 5, PATCH))  # [B, T, C]
NOISES = (
    np.random.default_rng(1).uniform(-0.5, 0.5, (4, 2, 5, 6)).astype(np.float32)
)  # [Z, B, T, U]
DURATIONS = np.array([1.0, 0.25, 2.0, 0.5, 1.5], np.float32)


def close(ours, theirs, **tolerance):
    """Equal to 1e-5, and neither constant nor of another shape."""
    theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.03
    np.testing.assert_allclose(np.asarray(ours), theirs, **(TOLERANCE | tolerance))


def flat(chunks):
    """Int [B, T, C] as the reference takes it, [B, T * C]."""
    return torch.tensor(chunks.reshape(len(chunks), -1))


@pytest.fixture(scope="module")
def theirs():
    """The autoencoder and the energy model in PyTorch."""
    return reference.random_autoencoder(), reference.random_energy_model()


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    """The published folders: of the energy model, of the autoencoder."""
    folder = tmp_path_factory.mktemp("published")
    ae, energy = map(reference.clone_tensors, theirs)
    reference.write_checkpoint(
        folder / "autoencoder", reference.autoencoder_fields(), ae
    )
    reference.write_checkpoint(folder / "calm", reference.energy_fields(), energy)
    return folder / "calm", folder / "autoencoder"


@pytest.fixture(scope="module")
def lm(folders):
    return calm.load(*folders)


@pytest.fixture(scope="module")
def ae(folders):
    return autoencoder.load(folders[1])


@pytest.fixture(scope="module")
def hidden(theirs):
    """Hidden states of the reference, [B, T, D]."""
    return theirs[1].hidden_states(flat(CHUNKS))


def normal(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


# --- The same numbers ------------------------------------------------------------------------


def test_latents(ae, theirs):
    mean, log_std = autoencoder.encode(ae, CHUNKS)
    expected = theirs[0].latents(torch.tensor(CHUNKS))
    close(mean, expected[0])
    close(log_std, expected[1])


def test_decoded_logits(ae, theirs):
    latents = normal(2, 5, 10)
    close(autoencoder.decode(ae, latents), theirs[0].logits(torch.tensor(latents)))


def test_one_chunk_alone(ae, theirs):
    """No leading axes at all."""
    mean, log_std = autoencoder.encode(ae, CHUNKS[1, 2])
    expected = theirs[0].latents(torch.tensor(CHUNKS[1, 2]))
    close(mean, expected[0])
    close(log_std, expected[1])


def test_the_autoencoder_of_the_model(lm, ae):
    assert_same_params(lm.params["autoencoder"], ae.params)
    np.testing.assert_array_equal(
        autoencoder.encode(calm.autoencoder_of(lm), CHUNKS)[0],
        autoencoder.encode(ae, CHUNKS)[0],
    )
    assert lm.model.chunk_size == PATCH


def test_hidden_states(lm, theirs, hidden):
    close(calm.hidden_states(lm, CHUNKS), hidden)


def test_hidden_states_of_durations(lm, theirs):
    expected = theirs[1].hidden_states(flat(CHUNKS), DURATIONS)
    close(calm.hidden_states(lm, CHUNKS, durations=DURATIONS), expected)


def test_durations_of_1_change_nothing(lm):
    plain = calm.hidden_states(lm, CHUNKS)
    close(
        calm.hidden_states(lm, CHUNKS, durations=np.ones(5, np.float32)),
        plain,
        rtol=1e-6,
        atol=1e-6,
    )


def test_samples(lm, theirs, hidden):
    """Four samples a position, the hidden states shared."""
    expected = theirs[1].sample(torch.tensor(NOISES), hidden)
    close(calm.transform(lm, NOISES, hidden.numpy()), expected)


@pytest.mark.parametrize("beta", [1.0, 1.7])
def test_energy_scores(lm, theirs, hidden, beta):
    """From tokens to the score, everything ours: the first four chunks predict what follows."""
    spread = normal(6, 2, 5, 10)
    samples = calm.transform(lm, NOISES, calm.hidden_states(lm, CHUNKS))
    mean, log_std = map(np.asarray, autoencoder.encode(calm.autoencoder_of(lm), CHUNKS))
    targets = (mean + np.exp(log_std) * spread)[:, :, 1:]
    ours = losses.energy_score(np.asarray(samples)[:, :, :-1], targets, beta=beta)
    mean, log_std = theirs[0].latents(torch.tensor(CHUNKS))
    targets = (mean + log_std.exp() * torch.tensor(spread))[:, :, 1:]
    samples = theirs[1].sample(torch.tensor(NOISES), hidden)[:, :, :-1]
    close(ours, reference.energy_score(samples, targets, beta))


SMALL = (  # what makes the inputs of the layer norms so small that their epsilon decides
    "noise_embd", "hidden_embd", "norm_noise", "embed_proj.2", "mlp_blocks.0.down_proj",
    "mlp_blocks.1.down_proj", "mlp_blocks.2.down_proj",
)  # fmt: skip


def test_epsilon_of_the_layer_norms(folders, tmp_path):
    theirs = reference.random_energy_model(seed=5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if any(part in name for part in SMALL):
                parameter *= 1e-3
    reference.write_checkpoint(
        tmp_path / "calm", reference.energy_fields(), reference.clone_tensors(theirs)
    )
    lm = calm.load(tmp_path / "calm", folders[1])
    hidden = theirs.hidden_states(flat(CHUNKS))
    close(calm.hidden_states(lm, CHUNKS), hidden)
    expected = theirs.sample(torch.tensor(NOISES), hidden)
    close(calm.transform(lm, NOISES, hidden.numpy()), expected)


@pytest.mark.slow
def test_derivatives_match_finite_differences(lm, theirs, hidden):
    """With respect to the noise and the hidden states, of a weighted sum of the samples."""
    noise, weights = NOISES[0], normal(2, 5, 10)
    ours = jax.grad(lambda *a: (calm.transform(lm, *a) * weights).sum(), (0, 1))(
        jnp.asarray(noise), jnp.asarray(hidden.numpy())
    )
    leaves = torch.tensor(noise, requires_grad=True), hidden.clone().requires_grad_()
    (theirs[1].sample(*leaves) * torch.tensor(weights)).sum().backward()
    for mine, leaf in zip(ours, leaves, strict=True):
        close(mine, leaf.grad, rtol=1e-4)


# --- Other ways to write the same down -------------------------------------------------------


@pytest.fixture
def energy(theirs):
    """Tensors of the energy model, to change."""
    return reference.clone_tensors(theirs[1])


@pytest.fixture
def autoencoders(theirs):
    """Tensors of the autoencoder, to change."""
    return reference.clone_tensors(theirs[0])


def renamed(tensors, old, new):
    """A copy of the tensors that begin with `old`, under the other name."""
    return {
        new + name.removeprefix(old): value.clone()
        for name, value in tensors.items()
        if name.startswith(old)
    }


def refusal(*folders, load=calm.load):
    with pytest.raises(clm.InputError) as refused:
        load(*folders)
    assert "\n" not in str(refused.value)
    return str(refused.value)


HEADS = [
    "mlp_generator.noise_embd.bias",
    "mlp_generator.mlp_blocks.1.linears.4.weight",
    "mlp_generator.final_layer.linears.2.weight",
]


def test_the_head_under_its_second_name(lm, folders, energy, tmp_path):
    """Beside the first, in its place, or, as of tensors that share memory one is saved, in part."""
    again = renamed(energy, "mlp_generator.", "generative_head.")
    others = {n: t for n, t in energy.items() if not n.startswith("mlp_generator.")}
    mixed = dict(list(energy.items())[:-9]) | dict(list(again.items())[-9:])
    for i, tensors in enumerate([energy | again, others | again, mixed]):
        folder = reference.write_checkpoint(
            tmp_path / str(i), reference.energy_fields(), tensors
        )
        assert_same_params(calm.load(folder, folders[1]).params, lm.params)


@pytest.mark.parametrize("name", HEADS)
def test_two_different_heads_are_refused(folders, energy, tmp_path, name):
    again = renamed(energy, "mlp_generator.", "generative_head.")
    other = name.replace("mlp_generator", "generative_head")
    again[other].view(-1)[-1] += 1e-3
    reference.write_checkpoint(tmp_path, reference.energy_fields(), energy | again)
    assert other in refusal(tmp_path, folders[1])


def test_half_of_the_head_under_its_second_name(folders, energy, tmp_path):
    """Neither copy is complete: the tensor that the second lacks is missing."""
    again = renamed(energy, "mlp_generator.", "generative_head.")
    others = {n: t for n, t in energy.items() if not n.startswith("mlp_generator.")}
    del again["generative_head.norm_hidden.bias"]
    reference.write_checkpoint(tmp_path, reference.energy_fields(), others | again)
    assert "norm_hidden.bias" in refusal(tmp_path, folders[1])


def test_the_embedding_table_under_two_names(ae, autoencoders, tmp_path):
    """Beside the encoder's, or in its place."""
    table = autoencoders["encoder.embed_tokens.weight"].clone()
    without_first = {
        n: t for n, t in autoencoders.items() if n != "encoder.embed_tokens.weight"
    }
    for i, tensors in enumerate([autoencoders, without_first]):
        tensors = tensors | {"decoder.lm_head_weight": table}
        folder = reference.write_checkpoint(
            tmp_path / str(i), reference.autoencoder_fields(), tensors
        )
        assert_same_params(autoencoder.load(folder).params, ae.params)


def test_a_different_embedding_table_is_refused(autoencoders, tmp_path):
    table = autoencoders["encoder.embed_tokens.weight"].clone()
    table[-1, -1] += 1e-3
    tensors = autoencoders | {"decoder.lm_head_weight": table}
    reference.write_checkpoint(tmp_path, reference.autoencoder_fields(), tensors)
    assert "decoder.lm_head_weight" in refusal(tmp_path, load=autoencoder.load)


def test_the_autoencoder_inside(lm, folders, energy, autoencoders, tmp_path):
    """The model's folder may have a copy of the autoencoder of the other folder."""
    inside = renamed(autoencoders, "", "ae_model.")
    inside["ae_model.decoder.lm_head_weight"] = autoencoders[
        "encoder.embed_tokens.weight"
    ].clone()
    reference.write_checkpoint(tmp_path, reference.energy_fields(), energy | inside)
    assert_same_params(calm.load(tmp_path, folders[1]).params, lm.params)


@pytest.mark.parametrize(
    "name",
    ["encoder.embed_tokens.weight", "decoder.decoder_layers.2.mlp.up_proj.weight"],
)
def test_a_different_autoencoder_inside_is_refused(
    folders, energy, autoencoders, tmp_path, name
):
    inside = renamed(autoencoders, "", "ae_model.")
    inside[f"ae_model.{name}"].view(-1)[0] += 1e-3
    reference.write_checkpoint(tmp_path, reference.energy_fields(), energy | inside)
    assert f"ae_model.{name}" in refusal(tmp_path, folders[1])


def test_half_an_autoencoder_inside(folders, energy, autoencoders, tmp_path):
    inside = renamed(autoencoders, "", "ae_model.")
    del inside["ae_model.decoder.norm.weight"]
    reference.write_checkpoint(tmp_path, reference.energy_fields(), energy | inside)
    assert "ae_model.decoder.norm.weight" in refusal(tmp_path, folders[1])


@pytest.mark.parametrize("shards", [0, 3])
def test_the_autoencoder_inside_alone(energy, autoencoders, tmp_path, shards):
    """Without an autoencoder's folder, tensors give its sizes, and the trunk its norms' epsilon."""
    apart, joint = tmp_path / "autoencoder", tmp_path / "calm"
    eps = reference.energy_fields()["rms_norm_eps"]
    reference.write_checkpoint(
        apart, reference.autoencoder_fields(rms_norm_eps=eps), autoencoders
    )
    inside = renamed(autoencoders, "", "ae_model.")
    inside["ae_model.decoder.lm_head_weight"] = autoencoders[
        "encoder.embed_tokens.weight"
    ].clone()
    reference.write_checkpoint(
        joint, reference.energy_fields(), energy | inside, num_shards=shards
    )
    joint_lm, codec = calm.load(joint), autoencoder.load(apart)
    assert_same_params(joint_lm.params["autoencoder"], codec.params)
    sizes = "vocab_size hidden_size mlp_size encoder_layers decoder_layers latent_size chunk_size"
    for name in f"{sizes} norm_eps activation".split():
        assert getattr(joint_lm.model.autoencoder_config, name) == getattr(
            codec.model.config, name
        ), name


def test_a_missing_autoencoder_is_refused(folders):
    assert "autoencoder" in refusal(folders[0])


@pytest.mark.parametrize("shards", [1, 3])
def test_shards(lm, energy, autoencoders, tmp_path, shards):
    calm_folder, folder = tmp_path / "calm", tmp_path / "autoencoder"
    reference.write_checkpoint(
        calm_folder, reference.energy_fields(), energy, num_shards=shards
    )
    reference.write_checkpoint(
        folder, reference.autoencoder_fields(), autoencoders, num_shards=shards
    )
    assert_same_params(calm.load(calm_folder, folder).params, lm.params)


@pytest.fixture
def rounded(energy, autoencoders, tmp_path):
    """Folders whose weights and config.json are of bfloat16."""
    folders = tmp_path / "calm", tmp_path / "autoencoder"
    kinds = reference.energy_fields, reference.autoencoder_fields
    for folder, fields, tensors in zip(
        folders, kinds, (energy, autoencoders), strict=True
    ):
        short = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        reference.write_checkpoint(folder, fields(torch_dtype="bfloat16"), short)
    return folders


def test_bfloat16_is_kept(rounded, lm):
    short = jax.tree.map(lambda a: np.asarray(a).astype(jnp.bfloat16), lm.params)
    assert_same_params(calm.load(*rounded).params, short)


def test_bfloat16_read_as_float32(rounded, theirs):
    """The numbers are then those of the rounded weights, to 1e-5 as ever."""
    lm = calm.load(*rounded, dtype=jnp.float32)
    ae, energy = reference.random_autoencoder(), reference.random_energy_model()
    for module in (ae, energy):
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16().float()
    expected = energy.hidden_states(flat(CHUNKS))
    close(calm.hidden_states(lm, CHUNKS), expected)
    vectors = energy.sample(torch.tensor(NOISES), expected)
    close(calm.transform(lm, NOISES, expected.numpy()), vectors)
    close(
        autoencoder.decode(calm.autoencoder_of(lm), vectors[0].numpy()),
        ae.logits(vectors[0]),
    )
    assert (expected - theirs[1].hidden_states(flat(CHUNKS))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "drop", [("architectures",), ("architectures", "model_type")], ids=str
)
def test_models_are_recognised_by_their_fields(
    lm, folders, energy, autoencoders, tmp_path, drop
):
    places = tmp_path / "calm", tmp_path / "autoencoder"
    for place, folder in zip(places, folders, strict=True):
        shutil.copytree(folder, place)
        fields = json.loads((place / "config.json").read_text())
        remaining = {name: value for name, value in fields.items() if name not in drop}
        (place / "config.json").write_text(json.dumps(remaining))
    assert_same_params(calm.load(*places).params, lm.params)


def test_models_are_recognised_by_their_architectures(lm, folders, energy, tmp_path):
    """Fields of training that were not saved are none of the model's."""
    fields = energy_without("num_samples", "ae_path", "beta")
    reference.write_checkpoint(tmp_path, fields, energy)
    assert_same_params(calm.load(tmp_path, folders[1]).params, lm.params)


def energy_without(*names):
    return {
        n: value for n, value in reference.energy_fields().items() if n not in names
    }


# --- Folders in the wrong place --------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


def test_folders_in_the_wrong_place(folders, llama):
    energy, ae = folders
    wrong = {
        "the two in turn": ((ae, energy), calm.load, ae),
        "a Llama as the energy model": ((llama, ae), calm.load, llama),
        "a Llama as the autoencoder": ((energy, llama), calm.load, llama),
        "the energy model twice": ((energy, energy), calm.load, energy),
        "the autoencoder twice": ((ae, ae), calm.load, ae),
        "the energy model alone": ((energy,), autoencoder.load, energy),
        "a Llama alone": ((llama,), autoencoder.load, llama),
    }
    for case, (folders, load, culprit) in wrong.items():
        message = refusal(*folders, load=load)
        assert str(culprit) in message, (case, message)
        assert "config.json" in message, (case, message)
        words = "architectures" if culprit != llama else "model_type|architectures"
        assert any(word in message for word in words.split("|")), (case, message)


def test_load_chooses_the_kind_of_model(folders, lm, ae, tmp_path):
    """An autoencoder, a folder that holds both, and one whose autoencoder lies elsewhere."""
    loaded = clm.load(folders[1])
    assert loaded.model == ae.model
    assert_same_params(loaded.params, ae.params)
    clm.save(tmp_path / "calm", lm)
    clm.save(tmp_path / "autoencoder", ae)
    again = clm.load(tmp_path / "calm", dtype="float32")
    assert again.model == lm.model
    assert_same_params(again.params, lm.params)
    assert_same_params(clm.load(tmp_path / "autoencoder").params, ae.params)
    assert "autoencoder; give its folder" in refusal(folders[0], load=clm.load)
    with pytest.raises(clm.InputError, match="leave out cache_dir"):
        clm.load(folders[1], cache_dir=tmp_path / "cache")


def test_other_kinds_have_no_logits(lm, ae):
    for other in (lm, ae):
        with pytest.raises(clm.InputError, match=r"models\.calm"):
            other(CHUNKS)


# --- Saved and loaded again ------------------------------------------------------------------


def stored(folder):
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model.safetensors")


def test_save(lm, theirs, tmp_path):
    """One folder holds both; PyTorch reads what we write."""
    calm.save(tmp_path / "calm", lm)
    again = calm.load(tmp_path / "calm")
    assert_same_params(again.params, lm.params)
    assert again.config == lm.config
    assert again.model == lm.model
    tensors = stored(tmp_path / "calm")
    inside = {n: t for n, t in tensors.items() if n.startswith("ae_model.")}
    expected = {
        "ae_model." + name: t for name, t in reference.clone_tensors(theirs[0]).items()
    }
    assert inside.keys() - {"ae_model.decoder.lm_head_weight"} == expected.keys()
    for name, tensor in {**expected, **reference.clone_tensors(theirs[1])}.items():
        assert torch.equal(tensors[name], tensor), name
    close(
        calm.hidden_states(again, CHUNKS),
        np.asarray(calm.hidden_states(lm, CHUNKS)),
        rtol=0,
        atol=0,
    )


def test_save_of_the_autoencoder(ae, theirs, tmp_path):
    autoencoder.save(tmp_path / "autoencoder", ae)
    again = autoencoder.load(tmp_path / "autoencoder")
    assert_same_params(again.params, ae.params)
    assert again.model == ae.model
    reference.Autoencoder(reference.autoencoder_fields()).load_state_dict(
        {
            n: t
            for n, t in stored(tmp_path / "autoencoder").items()
            if "lm_head" not in n
        }
    )


def test_saved_config_is_as_it_is_published(lm, ae, tmp_path):
    """Every field that decides on results is written back as it was read."""
    calm.save(tmp_path / "calm", lm)
    autoencoder.save(tmp_path / "autoencoder", ae)
    for folder, fields in (
        (tmp_path / "calm", reference.energy_fields()),
        (tmp_path / "autoencoder", reference.autoencoder_fields()),
    ):
        saved = json.loads((folder / "config.json").read_text())
        for name in set(fields) & set(DECISIVE):
            assert saved[name] == fields[name], name
        assert saved["architectures"] == fields["architectures"]


DECISIVE = """
    beta hidden_size intermediate_size latent_size noise_size num_attention_heads
    num_decoder_layers num_encoder_layers num_hidden_layers num_key_value_heads num_mlp_layers
    num_samples patch_size rms_norm_eps vocab_size
""".split()


@pytest.mark.slow
def test_saved_in_bfloat16(rounded, tmp_path):
    lm = calm.load(*rounded)
    calm.save(tmp_path / "again", lm)
    assert_same_params(calm.load(tmp_path / "again").params, lm.params)


# --- The reference itself --------------------------------------------------------------------


def test_reference_with_chunks_of_one_token_is_llama(hidden):
    """With K = 1 and nothing between the table and the trunk."""
    one = reference.random_energy_model(patch_size=1)
    one.embed_proj = torch.nn.Identity()
    tokens = flat(CHUNKS)
    expected = one.transformer(input_ids=tokens).last_hidden_state
    close(one.hidden_states(tokens), expected, rtol=0, atol=0)
    assert not torch.equal(hidden[:, 0], hidden[:, 1])


def test_reference_reads_chunks_in_order(theirs):
    """The expected vector is the concatenated rows of four tokens, times the first matrix."""
    model, tokens = theirs[1], [7, 3, 39, 0]
    table, names = (
        model.transformer.embed_tokens.weight.numpy(),
        dict(model.named_parameters()),
    )
    weight, bias = (
        names[f"embed_proj.0.{kind}"].numpy() for kind in ("weight", "bias")
    )
    x = bias + sum(
        weight[:, 32 * i : 32 * (i + 1)] @ table[t] for i, t in enumerate(tokens)
    )
    x = names["embed_proj.2.bias"].numpy() + names["embed_proj.2.weight"].numpy() @ (
        x / (1 + np.exp(-x))
    )
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
    x = x * names["embed_proj.3.weight"].numpy() + names["embed_proj.3.bias"].numpy()
    close(model.trunk_inputs(torch.tensor([tokens]))[0, 0], x)


def test_reference_of_durations_is_causal_and_needs_no_durations_of_1(theirs, hidden):
    tokens, model = flat(CHUNKS), theirs[1]
    close(model.hidden_states(tokens, np.ones(5)), hidden)
    other = tokens.clone()
    other[:, 4 * 3 :] = (other[:, 4 * 3 :] + 1) % VOCABULARY
    moved = model.hidden_states(other, DURATIONS)
    unchanged = model.hidden_states(tokens, DURATIONS)
    assert (moved - unchanged)[:, :3].abs().max() < 1e-6
    assert (moved - unchanged)[:, 3:].abs().min(dim=-1).values.max() > 1e-4


def test_reference_norm_equals_that_of_torch():
    x, norm = torch.tensor(normal(7, 24)), reference.RmsNorm(24, 0.02)
    norm.weight.data += torch.tensor(normal(24))
    expected = torch.nn.functional.rms_norm(x, (24,), norm.weight, 0.02)
    close(norm(x).detach(), expected.detach())


def test_reference_layers_before_the_squeeze_see_one_token(theirs):
    """A token changes only its quarter of the input of the squeeze layer."""
    encoder, inputs = theirs[0].encoder, []
    hook = encoder.squeeze_layer.register_forward_pre_hook(
        lambda _, arguments: inputs.append(arguments[0])
    )
    for third in (3, 4):
        encoder(torch.tensor([1, 2, third, 5]))
    hook.remove()
    moved = (inputs[0] - inputs[1]).reshape(4, 24).abs().max(dim=-1).values > 0
    assert moved.tolist() == [False, False, True, False]


def test_reference_energy_score_by_hand():
    """Points on a line, 1, 5, 2 and 2 from the targets and 3 from one another."""
    samples, targets = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [5.0]])
    near = (1.0 + 5.0**1.5 + 2.0**1.5 + 2.0**1.5) / 4
    expected = 2 * near - 3.0**1.5
    assert float(reference.energy_score(samples, targets, 1.5)) == pytest.approx(
        expected, rel=1e-12
    )


def test_the_package_exports_load_and_no_private_module():
    assert clm.models.calm.load is calm.load
    assert not hasattr(clm.models, "calm_loading")
