"""The shipped digits classifier, its feature extractor and the script that makes it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sim_jax import images as image_files
from sim_jax.data import digits
from sim_jax.data.images import open_images
from sim_jax.evals import features as features_lib
from sim_jax.evals import streams, train_classifier
from sim_jax.models.classifier import DigitsClassifier


@pytest.fixture(scope="module")
def extractor():
    return features_lib.digits_features()


@pytest.fixture(scope="module")
def real():
    return digits.load()


def test_the_asset_knows_the_digits_and_says_how_it_was_made(extractor, real):
    features, probabilities = extractor(real.images)
    assert features.shape == (1797, 64) and features.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    accuracy = (probabilities.argmax(axis=1) == real.labels).mean()
    assert accuracy >= 0.99
    _, metadata = features_lib.load_classifier()
    assert float(metadata["held_out_accuracy"]) >= 0.99
    assert float(metadata["accuracy"]) == pytest.approx(accuracy, abs=1e-3)
    assert metadata["command"].startswith("python -m sim_jax.evals.train_classifier --steps=")
    assert {"seed", "versions", "folds", "digits"} <= metadata.keys() and "jax==" in metadata["versions"]
    assert features_lib.DIGITS_CLASSIFIER.stat().st_size < 300_000


def test_the_mnist_asset_knows_its_digits_and_says_how_it_was_made(shared_dir):
    _, metadata = features_lib.load_classifier(features_lib.MNIST_CLASSIFIER)
    assert float(metadata["held_out_accuracy"]) >= 0.985 and metadata["held_out"] == "10000" and metadata["image_shape"] == "[28, 28, 1]"
    assert metadata["command"].startswith("python -m sim_jax.evals.train_classifier --data=mnist-28x28.zip --steps=")
    assert features_lib.MNIST_CLASSIFIER.stat().st_size <= 1_000_000
    path = shared_dir / "data" / "mnist-28x28.zip"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the shared data")
    stream = streams.open_stream(str(path))
    assert stream.count == int(metadata["images"])
    # The images that the training did not see, by its own rule.
    unseen = np.sort(np.random.default_rng(int(metadata["seed"])).permutation(stream.count)[:int(metadata["held_out"])])[:1500]
    source = open_images(path, cache_bytes=0)
    images = np.stack([source[int(i)]["image"] for i in unseen])
    features, probabilities = features_lib.open_features("mnist")(images)
    assert (probabilities.argmax(axis=1) == source.labels[unseen]).mean() >= 0.985
    assert np.var(features, axis=0).mean() == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match=r"got uint8 32x32x1, allowed: uint8 \[N,28,28,1\]"):
        features_lib.mnist_features()(np.zeros((2, 32, 32, 1), np.uint8))


def test_features_are_in_units_of_the_digits_spread(extractor, real):
    assert np.var(extractor(real.images)[0], axis=0).mean() == pytest.approx(1.0, abs=0.01)


def test_features_do_not_depend_on_the_company(extractor, real):
    together, probabilities = extractor(real.images[:300])
    for part in (slice(0, 1), slice(17, 40), slice(100, 300)):
        alone, alone_probabilities = extractor(real.images[part])
        np.testing.assert_allclose(alone, together[part], atol=2e-6)
        np.testing.assert_allclose(alone_probabilities, probabilities[part], atol=2e-6)
    np.testing.assert_array_equal(extractor(real.images[:256])[0], together[:256])   # nor on the padding


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batching_is_only_batching(batch):
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 2, 1), np.uint8)
    square, index = features_lib.batched(lambda x: (x.sum((1, 2, 3)) ** 2, jnp.argmax(x[:, :, 0, 0], 1)),
                                         batch=batch)(images)
    scaled = images / 127.5 - 1.0
    np.testing.assert_allclose(square, scaled.sum((1, 2, 3)) ** 2, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(index, images[:, :, 0, 0].argmax(1))


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8, 3), np.uint8),
                                    np.zeros((8, 8, 1), np.uint8), np.zeros((0, 8, 8, 1), np.uint8)])
def test_other_images_are_refused(extractor, images):
    with pytest.raises(ValueError, match=r"images: got .*allowed: uint8 \[N,8,8,1\]"):
        extractor(images)


def test_the_identifier_follows_the_weights(extractor, tmp_path):
    tensors = load_file(features_lib.DIGITS_CLASSIFIER)
    save_file(tensors, tmp_path / "same.safetensors")   # without metadata
    tensors["logits.bias"] = tensors["logits.bias"] + np.float16(0.1)
    save_file(tensors, tmp_path / "other.safetensors")
    assert features_lib.digits_features(tmp_path / "same.safetensors").identifier == extractor.identifier
    assert features_lib.digits_features(tmp_path / "other.safetensors").identifier != extractor.identifier


def test_damaged_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="classifier: got .*missing"):
        features_lib.digits_features(tmp_path / "missing.safetensors")
    shutil.copyfile(features_lib.DIGITS_CLASSIFIER, tmp_path / "cut.safetensors")
    with open(tmp_path / "cut.safetensors", "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(ValueError, match="classifier: got .*cut"):
        features_lib.digits_features(tmp_path / "cut.safetensors")
    save_file({"conv_in.kernel": np.zeros((3, 3, 1, 24), np.float16)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="1 tensors, allowed: the"):
        features_lib.digits_features(tmp_path / "foreign.safetensors")


def test_scaling_the_features_leaves_the_logits(real):
    images = real.images[:200].astype(np.float32) / 127.5 - 1.0
    model = DigitsClassifier()
    params = model.init(jax.random.key(0), images)["params"]
    scaled = train_classifier.scale_features(model, params, images)
    features, logits = model.apply({"params": scaled}, images)
    assert np.var(np.asarray(features), axis=0).mean() == pytest.approx(1.0, rel=1e-4)
    np.testing.assert_allclose(logits, model.apply({"params": params}, images)[1], atol=1e-5)


def test_the_network_takes_larger_digits():
    model = DigitsClassifier()
    shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0],
                            jnp.zeros((2, 28, 28, 1)))
    assert [s.shape for s in shapes] == [(2, 64), (2, 10)]


def test_augmentation_in_its_limits(real):
    images = jnp.asarray(real.images[:64], jnp.float32) / 127.5 - 1.0
    key = jax.random.key(0)
    still = train_classifier.augment(key, images, shift=0.0, shear=0.0, noise=0.0)
    np.testing.assert_allclose(still, images, atol=1e-5)
    away = train_classifier.augment(key, images, shift=0.0, shear=0.0, noise=2.0)
    std = np.std(np.asarray(away - images), axis=(1, 2, 3))   # one U(0, 2) for each image
    assert std.min() < 0.5 and 1.5 < std.max() < 2.5 and std.mean() == pytest.approx(1.0, abs=0.2)
    # A shift of a linear ramp by s adds s to it, wherever the image does not end.
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, :, None, None] / 8, (64, 8, 8, 1))
    added = 8 * np.asarray(train_classifier.augment(key, ramp, shear=0.0, noise=0.0) - ramp)[:, 2:6, 2:6, 0]
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-4)
    assert added.min() < -0.8 and added.max() > 0.8 and np.abs(added).max() <= 1.0 + 1e-4


def test_the_script_writes_what_the_extractor_reads(tmp_path, capsys):
    out = tmp_path / "new" / "classifier.safetensors"
    arguments = [f"--out={out}", "--steps=12", "--batch_size=32", "--folds=2", "--seed=3"]
    assert train_classifier.main(arguments) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    first = features_lib.digits_features(out).identifier
    _, metadata = features_lib.load_classifier(out)
    assert metadata["command"].endswith("--steps=12 --batch_size=32 --learning_rate=0.002 "
                                        "--weight_decay=0.001 --folds=2 --seed=3")
    assert 0.05 < float(metadata["held_out_accuracy"]) < 0.99   # so few steps do not suffice
    assert train_classifier.main(arguments) == 0
    assert features_lib.digits_features(out).identifier == first   # a function of the seed


def test_the_script_trains_on_a_data_set_and_judges_by_what_it_held_out(tmp_path, capsys, real):
    image_files.save_samples(tmp_path / "data.zip", real.images[:300], real.labels[:300])
    out = tmp_path / "classifier.safetensors"
    flags = [f"--out={out}", f"--data={tmp_path / 'data.zip'}", "--steps=60", "--batch_size=64"]
    assert train_classifier.main([*flags, "--held_out=100"]) == 0
    assert "(100 images)" in capsys.readouterr().out
    params, metadata = features_lib.load_classifier(out)
    unseen = np.sort(np.random.default_rng(0).permutation(300)[:100])
    scaled = real.images[:300].astype(np.float32) / 127.5 - 1.0
    judged = train_classifier.accuracy(DigitsClassifier(), params, scaled[unseen], real.labels[unseen])
    assert float(metadata["held_out_accuracy"]) == pytest.approx(judged, abs=1e-4)   # of the very weights that were written
    assert "--data=data.zip" in metadata["command"] and str(tmp_path) not in str(metadata) and "folds" not in metadata
    assert train_classifier.main([*flags, "--held_out=300"]) == 2
    assert "held_out: got 300, allowed: fewer than the 300 images" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--folds=1", "--steps=0", "--learning_rate=nan", "--held_out=0"])
def test_the_script_refuses_bad_numbers(tmp_path, capsys, flag):
    assert train_classifier.main([f"--out={tmp_path / 'x'}", flag]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and flag[2:].split("=")[0] in message and not (tmp_path / "x").exists()
