"""Valid files, damaged at random for a bounded number of rounds: they are read, or refused with a ValueError, and nothing else.

Damage is of two sorts: to bytes (flipped, cut, doubled, moved), and to values before they are written (one leaf of the object tree
replaced by something odd), which keeps the file well-formed and so gets further.
"""

import random
import time
import warnings

import jax
import numpy as np
import pytest

import checkpoint_writer as writer
from sim_jax import networks, param_table
from sim_jax.convert import edm, kinds, torch_state
from sim_jax.convert.pickle_machine import Record

SPEC = networks.full_spec({"img_resolution": 4, "img_channels": 1, "model_type": "SongUNet", "model_channels": 4, "num_blocks": 1,
                           "channel_mult": (1,), "attn_resolutions": (), "channel_mult_emb": 1, "label_dim": 2})
NETWORK = networks.build(SPEC)
STATE = param_table.to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), NETWORK.shapes()))
FILES = {
    "edm": writer.edm_pickle(STATE, SPEC),
    "dmd2": writer.save_zip(STATE),
    "fastgen": writer.save_zip(STATE, wrap=lambda sd: {"model": {"net": {}, "ema": sd}, "iteration": 3}),
    "sid": writer.save_legacy(STATE),
    "safetensors": writer.safetensors(STATE),
}
ODD = [None, True, -1, 0, 1 << 62, 1.5, float("nan"), float("inf"), "", "x", "model.", b"bytes", (), (1, 2), [], [[]], {}, {"a": {}}, set(),
       writer.New("torch.nn.modules.container.ModuleDict"), writer.Name("torch.FloatStorage"), writer.Call("torch.Size", ((1,),)),
       writer.persistent("Linear", {}), writer.Call("collections.OrderedDict"), writer.Name("os.system"), writer.Raw(b"(")]


def damage(content: bytes, rng: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                out = out[:max(at, 1)]
            case 3:
                del out[at:at + rng.randrange(1, 20)]
            case 4:
                out[at:at] = out[at:at + rng.randrange(1, 40)]
            case 5:
                out[at:at + 8] = rng.randbytes(8)
        out = out or bytearray(b"\x80")
    return bytes(out)


def leaves(value, path=()):
    """Paths to everything in a tree of dicts, lists, tuples and calls."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))


def replaced(value, path, new):
    if not path:
        return new
    if isinstance(value, dict):
        return {key: replaced(item, path[1:], new) if key == path[0] else item for key, item in value.items()}
    items = [replaced(item, path[1:], new) if i == path[0] else item for i, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def attempt(kind: str, content: bytes, path) -> bool:
    """Whether the file was accepted. Anything but a ValueError of one line fails the test, and so does a warning."""
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kinds.read(kind, str(path))
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path)), error
        return False
    return True


@pytest.mark.parametrize("kind", FILES)
def test_damaged_bytes(kind, tmp_path, monkeypatch):
    # Fitting the tensors to the network is the slow part, and none of the file's business.
    shapes = NETWORK.shapes()
    monkeypatch.setattr(networks.Network, "shapes", lambda self: shapes)
    rng = random.Random(0)
    assert attempt(kind, FILES[kind], tmp_path / "file")
    start = time.monotonic()
    accepted = [attempt(kind, damage(FILES[kind], rng), tmp_path / "file") for _ in range(500)]
    assert 0 < sum(accepted) < 500  # some damage only changes weights, most is noticed
    assert time.monotonic() - start < 120


def test_odd_values(tmp_path, monkeypatch):
    shapes = NETWORK.shapes()
    monkeypatch.setattr(networks.Network, "shapes", lambda self: shapes)
    module = writer.edm_module(STATE, SPEC)
    tree = {"ema": module}
    paths = [path for path in leaves(tree) if not any(isinstance(step, str) and step in ("enc", "dec") for step in path)]
    rng, accepted = random.Random(1), 0
    for path in rng.sample(paths, min(len(paths), 600)):
        try:
            content = writer.dumps(replaced(tree, path, rng.choice(ODD)))
        except (TypeError, AttributeError):  # the writer needs its own values where they were: names of constructors
            continue
        accepted += attempt("edm", content, tmp_path / "file")
    assert 0 < accepted < 600


def test_every_short_start_of_a_file_is_refused(tmp_path):
    for kind, content in FILES.items():
        for size in [*range(1, 40), *range(40, len(content) - 1, max(1, len(content) // 40))]:
            assert not attempt(kind, content[:size], tmp_path / "file"), (kind, size)


def test_random_operations(tmp_path):
    """Programs of allowed operations in random order, straight into the machine."""
    rng = random.Random(2)
    codes = b"(0120N\x88K\x01M\x01\x02)t\x85\x86\x87]ae}su\x8f\x90\x91q\x00h\x00h\x01\x94Rb\x81Q"
    for _ in range(2000):
        program = bytes(rng.choice(codes) for _ in range(rng.randrange(1, 60)))
        (tmp_path / "file").write_bytes(b"\x80\x04" + program + b".")
        try:
            value = torch_state.read(tmp_path / "file")
        except ValueError:
            continue
        assert isinstance(value, (dict, list, tuple, set, frozenset, int, float, bool, type(None), Record))


def test_the_undamaged_files_hold_the_same(tmp_path):
    for kind, content in FILES.items():
        (tmp_path / "file").write_bytes(content)
        state = kinds.read(kind, str(tmp_path / "file")).state
        for name, array in edm.without_buffers(STATE, NETWORK, source="test").items():
            np.testing.assert_array_equal(state[name], array)
