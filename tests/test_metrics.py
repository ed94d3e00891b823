"""metrics.jsonl through kills and resumes, TensorBoard events, clock, progress bar, sample statistics."""

from __future__ import annotations

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sim_jax import metrics
from sim_jax.progress import Clock, ProgressBar, clock_text


def _strict(path):
    """The file's rows by a parser that refuses NaN and Infinity; every line must be whole."""
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _run(workdir, steps, *, start_step=0, scale=1.0):
    with metrics.MetricWriter(workdir, start_step=start_step, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, step * 0.5, {"generator/loss": jnp.float32(scale * step)})
    return workdir / "metrics.jsonl"


class _Recorder:
    """Stands for a device scalar; tells when it is copied and when it is waited for."""

    shape, size, ndim = (), 1, 0

    def __init__(self, value, events):
        self.value, self.events = value, events

    def copy_to_host_async(self):
        self.events.append(("copy", self.value))

    def __array__(self, dtype=None, copy=None):
        self.events.append(("wait", self.value))
        return np.asarray(self.value, dtype)


def test_rows_are_strict_json_of_numbers(tmp_path):
    with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(10, 0.64, {"a": jnp.float32(0.5), "b": 2, "c": np.float64(1e-7), "d": jnp.ones((1, 1)),
                                "e": jnp.bfloat16(1.5), "f": jnp.int32(3)})
        writer.write(20, 1.28, {"a": math.nan, "b": jnp.float32(jnp.inf), "c": -math.inf})
    rows = _strict(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 10, "kimg": 0.64, "a": 0.5, "b": 2.0, "c": 1e-7, "d": 1.0, "e": 1.5, "f": 3.0},
                    {"step": 20, "kimg": 1.28, "a": None, "b": None, "c": None}]
    assert math.isnan(metrics.read_metrics(tmp_path)[1]["a"])
    assert metrics.read_metrics(tmp_path)[0] == rows[0]


def test_write_does_not_wait_for_the_device(tmp_path):
    events = []
    writer = metrics.MetricWriter(tmp_path, tensorboard=False)
    writer.write(1, 0.1, {"loss": _Recorder(1.0, events)})
    assert events == [("copy", 1.0)] and _strict(tmp_path / "metrics.jsonl") == []
    writer.write(2, 0.2, {"loss": _Recorder(2.0, events)})
    assert events == [("copy", 1.0), ("copy", 2.0), ("wait", 1.0)]
    assert [row["loss"] for row in _strict(tmp_path / "metrics.jsonl")] == [1.0]
    assert writer.latest == {"loss": 1.0}
    writer.flush()
    assert [row["loss"] for row in _strict(tmp_path / "metrics.jsonl")] == [1.0, 2.0]
    assert writer.latest == {"loss": 2.0}
    writer.close()


def test_figures_of_the_waiting_step_join_its_line(tmp_path):
    with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, 1.0, {"loss": 1.0})
        writer.write(5, 1.0, {"fd/generator": 2.0})
        writer.write(6, 1.2, {"loss": 3.0})
    assert _strict(tmp_path / "metrics.jsonl") == [{"step": 5, "kimg": 1.0, "loss": 1.0, "fd/generator": 2.0},
                                                   {"step": 6, "kimg": 1.2, "loss": 3.0}]


def test_resume_repeats_no_line(tmp_path):
    whole = _run(tmp_path / "whole", range(0, 101, 10)).read_bytes()
    path = _run(tmp_path / "killed", range(0, 81, 10))               # killed at 80, the checkpoint is of 40
    _run(tmp_path / "killed", range(50, 101, 10), start_step=40)
    assert path.read_bytes() == whole
    _run(tmp_path / "killed", (), start_step=100)                    # already finished: nothing changes
    assert path.read_bytes() == whole
    _run(tmp_path / "killed", range(0, 101, 10))                     # nothing was saved: all over again
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [b'{"step": 50, "ki', b"{", b"\0\0\0\0", b'{"step": 50, "kimg": 25.0}'])
def test_half_written_last_line_is_repaired(tmp_path, cut):
    path = _run(tmp_path, (10, 20, 30))
    whole = path.read_bytes()
    path.write_bytes(whole + cut)
    assert [row["step"] for row in metrics.read_metrics(path)][:3] == [10, 20, 30]
    _run(tmp_path, (40,), start_step=30)
    assert path.read_bytes().startswith(whole)
    assert [row["step"] for row in _strict(path)] == [10, 20, 30, 40]


def test_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = _run(tmp_path, (10, 20))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    _run(tmp_path, (30,), start_step=20)
    assert [row["step"] for row in _strict(path)] == [10, 20, 30]


def test_failing_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    path = _run(tmp_path, (10, 20, 30))
    old = path.read_bytes()

    def refuse(*paths):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(metrics.files.os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        metrics.MetricWriter(tmp_path, start_step=10, tensorboard=False)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_bad_figures_and_workdirs_are_named(tmp_path):
    with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="'loss' of shape .2., allowed: single numbers"):
            writer.write(1, 0.1, {"loss": jnp.zeros(2)})
        with pytest.raises(ValueError, match="name 'step'"):
            writer.write(1, 0.1, {"step": 1.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="workdir: got .*file"):
        metrics.MetricWriter(tmp_path / "file" / "run")


def test_disabled_writer_touches_nothing(tmp_path):
    with metrics.MetricWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, 0.1, {"loss": 1.0})
        writer.write_image(1, "samples", np.zeros((8, 8, 3), np.uint8))
        writer.flush()
    assert not list(tmp_path.iterdir())


def _events(folder):
    """(file, event) pairs of TensorBoard's record files: length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield path, Event.FromString(data[12:12 + size])
            data = data[16 + size:]


def test_tensorboard_gets_scalars_images_and_the_step_to_purge(tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write(10, 1.0, {"generator/loss": jnp.float32(0.25), "bad": math.nan})
        writer.write_image(10, "samples/generator", np.full((4, 6, 1), 7, np.uint8))
    first = {path for path, _ in _events(tmp_path / "tensorboard")}
    values = [(event.step, value) for _, event in _events(tmp_path / "tensorboard")
              for value in event.summary.value]
    assert [(step, v.tag, v.simple_value) for step, v in values if not v.HasField("image")] == [
        (10, "generator/loss", 0.25)]
    (picture,) = [v.image for _, v in values if v.HasField("image")]
    assert (picture.height, picture.width) == (4, 6) and picture.encoded_image_string.startswith(b"\x89PNG")
    with metrics.MetricWriter(tmp_path, start_step=5):
        pass
    starts = [event.step for path, event in _events(tmp_path / "tensorboard")
              if path not in first and event.HasField("session_log")]
    assert starts == [6]                               # TensorBoard forgets steps >= 6 of the killed run


def test_sharded_figures_are_written(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, 0.1, {"loss": jax.device_put(0.5, replicated)})
    assert _strict(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5


class _Time:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_clock_leaves_compilation_and_pauses_out():
    now = _Time()
    clock = Clock(now=now, earlier=1000.0)
    assert clock.seconds_to_first_step is None and clock.images_per_second() is None
    now.seconds += 30                                   # compiles
    clock.count(64)
    assert clock.seconds_to_first_step == 30
    for _ in range(10):
        now.seconds += 0.5
        clock.count(64)
    with clock.pause():
        now.seconds += 40                               # evaluates
    assert clock.images_per_second() == 640 / 5
    assert clock.images_per_second() is None            # a new window, empty
    now.seconds += 2
    clock.count(64)
    assert clock.images_per_second() == 32
    assert clock.seconds == 1000 + 30 + 5 + 40 + 2 and clock.seconds_to_first_step == 30


def test_progress_off_a_terminal_prints_few_lines_with_eta():
    now, stream = _Time(), io.StringIO()
    with ProgressBar(1000, initial=500, description="digits", images_per_step=64, figures=("loss",),
                     stream=stream, now=now, every_seconds=1e9) as bar:
        for step in range(501, 1001):
            now.seconds += 20 if step == 501 else 0.5
            bar.update(step, {"loss": 1 / step, "other": 0.0})
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and len(lines) == 6           # the first, 60%, 70%, ... 100%
    assert lines[0] == "digits: 501/1000 steps (50%) | 0:20 elapsed | loss 0.001996"
    # 600: 99 steps in 49.5 s after the first one; 400 steps are left at 2 a second.
    assert lines[1] == "digits: 600/1000 steps (60%) | 1:10 elapsed | 128 images/s | ETA 3:20 | loss 0.001667"
    assert "(100%)" in lines[-1] and "ETA 0:00" in lines[-1]


def test_progress_off_a_terminal_is_never_silent_for_long():
    now, stream = _Time(), io.StringIO()
    with ProgressBar(10**6, stream=stream, now=now, every_seconds=60) as bar:
        for step in range(1, 101):
            now.seconds += 7
            bar.update(step)
    assert len(stream.getvalue().splitlines()) == 1 + 11           # every 63 s of the 693 s after the first


def test_progress_on_a_terminal_is_one_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream, now = Terminal(), _Time()
    with ProgressBar(100, description="sampling", unit="images", figures=("loss",), stream=stream,
                     now=now) as bar:
        for step in range(1, 101):
            now.seconds += 1.0
            bar.update(step, {"loss": 0.5})
        bar.note("saved")
    last = stream.getvalue().split("\r")[-1]
    assert "100%" in last and "100/100" in last and "1 images/s, ETA 0:00, loss 0.5" in last
    assert "sampling: saved\n" in stream.getvalue()


def test_disabled_progress_is_silent():
    stream = io.StringIO()
    with ProgressBar(10, stream=stream, enabled=False) as bar:
        bar.update(10)
        bar.note("text")
    assert stream.getvalue() == ""


def test_clock_text():
    assert [clock_text(s) for s in (0, 65, 59.6, 3725, None, math.inf)] == [
        "0:00", "1:05", "1:00", "1:02:05", "?", "?"]


def test_image_statistics_by_hand():
    black_white = np.zeros((2, 2, 2, 1), np.uint8)
    black_white[:, 0] = 255                                            # both images: a white and a black row
    grey = np.full((4, 2, 2, 1), -1.0)
    grey[:2] = 0.5                                                     # flat images: two at 0.5, two at -1
    out = metrics.image_statistics(black_white, grey)
    assert out == pytest.approx({"samples/mean": 0.0, "samples/std": 1.0, "samples/diversity": 0.0,
                                 "samples/mean_reference": -0.25, "samples/std_reference": 0.0,
                                 "samples/diversity_reference": 0.75})
