"""Several processes: who they are, how they meet, what they agree on, and that two of them do what one does."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

import tiny
import two_processes
from sim_jax import checkpoint, distributed, evaluate, main, rendezvous, sample, sharding
from sim_jax.data import digits, pipeline
from sim_jax.distributed import Place
from sim_jax.evals import features, inception
from sim_jax.evals.generate import ImageSampler, Latents, SamplerSpec

ROOT = pathlib.Path(__file__).resolve().parents[1]
HERE = pathlib.Path(__file__).resolve().parent


def values(**changes):
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **changes})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[003-005,9],x1", "SLURM_NTASKS": "99", "SLURM_STEP_NUM_TASKS": "4",
         "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
       "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
EXPLICIT = dict(coordinator="h:1", num_processes=3, process_id=1)


@pytest.mark.parametrize("environ, flags, place", [
    ({}, {}, None),
    ({}, EXPLICIT, Place("--coordinator", "h:1", 3, 1)),
    ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}, {}, Place("--coordinator", "h:1", 3, 1)),
    ({"JAX_COORDINATOR_ADDRESS": "g:2", "JAX_NUM_PROCESSES": "9", "JAX_PROCESS_ID": "0"}, EXPLICIT, Place("--coordinator", "h:1", 3, 1)),
    ({}, {**EXPLICIT, "distributed": "off"}, None),
    ({}, dict(num_processes=1), None),                                  # alone, whatever else
    ({}, dict(coordinator="[::1]:80", num_processes=2, process_id=0), Place("--coordinator", "[::1]:80", 2, 0)),
    (SLURM, {}, Place("SLURM", "node003:61441", 4, 2, None)),           # one a node: all its GPUs
    (SLURM | {"SLURM_STEP_NODELIST": "gpu7"}, {}, Place("SLURM", "gpu7:61441", 4, 2, None)),
    (SLURM | {"SLURM_STEP_NODELIST": "a1,a2", "JAX_COORDINATOR_PORT": "77"}, {}, Place("SLURM", "a1:77", 4, 2, None)),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, {}, Place("SLURM", "node003:61441", 4, 2, [3])),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}, {},
     Place("SLURM", "node003:61441", 4, 2, None)),                      # bound by SLURM: the one that it sees
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {}, None),
    ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, {}, None),       # a batch script, without srun
    (SLURM, dict(coordinator="h:5"), Place("SLURM", "h:5", 4, 2, None)),
    (MPI, {}, Place("Open MPI", "10.96.0.1:" + str(61440 + 1110), 4, 3, [1])),
    ({k: v for k, v in MPI.items() if "uri" not in k} | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, {"coordinator": "h:9"},
     Place("Open MPI", "h:9", 4, 3, [1])),
])
def test_who_is_who(environ, flags, place):
    found = distributed.find(values(**flags), environ)
    if place is not None and place.by == "Open MPI" and place.coordinator.startswith("10."):
        host, port = found.coordinator.split(":")
        assert host == "10.96.0.1" and 61440 <= int(port) < 65536
        place = place._replace(coordinator=found.coordinator)
    assert found == place


def test_a_pod_finds_itself():
    assert distributed.find(values(), {}, on_tpu=True) == Place("TPU pod")
    assert distributed.find(values(distributed="off"), {}, on_tpu=True) is None
    assert distributed.find(values(**EXPLICIT), {}, on_tpu=True).by == "--coordinator"


def test_open_mpi_5_on_one_machine_meets_at_home():
    here = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMIX_NAMESPACE": "run-7@1"}
    both = [distributed.find(values(), here | {"OMPI_COMM_WORLD_RANK": rank}) for rank in "01"]
    assert both[0].coordinator == both[1].coordinator and both[0].coordinator.startswith("127.0.0.1:")


@pytest.mark.parametrize("environ, flags, words", [
    ({}, dict(distributed="on"), "--distributed: got 'on'"),
    ({}, dict(coordinator="h:1"), "--num_processes: missing"),
    ({}, dict(coordinator="h:1", num_processes=2), "--process_id: missing"),
    ({}, dict(process_id=1, num_processes=2), "--coordinator: missing"),
    ({}, dict(coordinator="h:1", num_processes=2, process_id=2), "--process_id: got 2, allowed: 0 to 1"),
    ({}, dict(coordinator="h:1", num_processes=2, process_id=-1), "--process_id: got -1"),
    ({}, dict(coordinator="h:1", num_processes=0, process_id=0), "--num_processes: got 0"),
    ({}, dict(coordinator="h", num_processes=2, process_id=1), "--coordinator: got 'h', allowed: host:port"),
    ({}, dict(coordinator="h:99999", num_processes=2, process_id=1), "--coordinator: got 'h:99999'"),
    ({}, dict(EXPLICIT, start_timeout=0.0), "--start_timeout: got 0"),
    ({"JAX_PROCESS_ID": "one"}, {}, "JAX_PROCESS_ID: got 'one', allowed: a whole number"),
    ({k: v for k, v in MPI.items() if "uri" not in k}, {}, "--coordinator: missing; Open MPI alone does not say it"),
])
def test_contradictions_are_one_line(environ, flags, words):
    with pytest.raises(ValueError) as error:
        distributed.find(values(**flags), environ)
    assert words in str(error.value) and "allowed" in str(error.value) and "\n" not in str(error.value)


def _meet(*who, timeout=5.0, address=None):
    """What each of (index, count) hears: None, or the error."""
    address, heard = address or f"127.0.0.1:{free_port()}", {}

    def one(number, index, count):
        try:
            rendezvous.meet(address, count=count, index=index, timeout=timeout)
            heard[number] = None
        except rendezvous.Failed as error:
            heard[number] = error

    threads = [threading.Thread(target=one, args=(number, *item)) for number, item in enumerate(who)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return [heard[number] for number in range(len(who))]


def test_processes_meet():
    assert _meet((0, 3), (2, 3), (1, 3)) == [None, None, None]


def test_a_stranger_at_the_door_is_nobody():
    port = free_port()

    def knock():
        for data in (b"GET / HTTP/1.0\r\n\r\n\n", b""):
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                        stranger.sendall(data)
                    break
                except OSError:
                    time.sleep(0.02)
        heard.extend(_meet((1, 2), address=f"127.0.0.1:{port}"))

    heard = []
    thread = threading.Thread(target=knock)
    thread.start()
    rendezvous.meet(f"127.0.0.1:{port}", count=2, index=0, timeout=15)
    thread.join()
    assert heard == [None]


@pytest.mark.parametrize("who, words", [
    (((0, 4), (2, 4)), "--num_processes: 2 of 4 processes came within 0.5 s, missing: 1, 3"),
    (((0, 3), (1, 4)), "--num_processes: got 4 in process 1, but 3 in process 0"),
    (((0, 3), (1, 3), (1, 3)), "--process_id: got 1 in two processes, allowed: each of 0 to 2 once"),
])
def test_everybody_hears_why_not_and_one_tells(who, words):
    heard = _meet(*who, timeout=0.5)
    assert all(words in str(error) for error in heard)
    assert [error.told_elsewhere for error in heard] == [False] + [True] * (len(who) - 1)


def test_process_0_is_missing():
    heard, = _meet((1, 2), timeout=0.3)
    assert "--coordinator: process 0 was not at 127.0.0.1:" in str(heard) and "within 0.3 s" in str(heard) and not heard.told_elsewhere


def test_the_port_is_taken():
    with socket.create_server(("", 0)) as server:
        heard, = _meet((0, 2), address=f"127.0.0.1:{server.getsockname()[1]}")
    assert "is not free" in str(heard)


@pytest.mark.parametrize("command", [
    lambda flags: main.main(["main", "--config=nothing.py", "--workdir=x", *flags]),
    lambda flags: sample.main(["--weights=builtin:digits", "--out=x.png", *flags]),
    lambda flags: evaluate.main(["--weights=builtin:digits", *flags])])
def test_a_missing_partner_is_one_line_and_exit_code_2(command, capsys):
    """Of the processes, before anything else is looked at; JAX's own start would abort with a stack trace."""
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=0", "--start_timeout=0.2"]
    assert command(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --num_processes: 1 of 2 processes came within 0.2 s, missing: 1;") and error.count("\n") == 1


def test_one_process_agrees_with_itself():
    assert distributed.together(lambda: 3) == 3 and distributed.is_first() and not distributed.several()
    distributed.check_same("x", "y")
    with pytest.raises(KeyError):
        distributed.together(lambda: {}["x"])


def test_lost_partners_are_told_from_bad_input(monkeypatch):
    lost = ValueError("UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:2")
    assert not distributed.is_lost_partner(lost)                        # alone
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "leave", lambda code: None)
    assert distributed.is_lost_partner(lost) and not distributed.is_lost_partner(ValueError("batch_size: got 3"))


def test_rows_of_a_mesh_that_does_not_follow_the_processes():
    """Whatever devices a process has, it reads those rows and no others; together they are the batch."""
    mesh = jax.sharding.Mesh(np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(4, 2), ("data", "fsdp"))
    where = sharding.Layout(mesh).batch
    rows = sharding.local_rows(where, 16)
    np.testing.assert_array_equal(rows, np.arange(16))
    whole = np.arange(48.0).reshape(16, 3)
    np.testing.assert_array_equal(np.asarray(sharding.from_rows(rows, whole, where, 16)), whole)

    class Half:                                                         # of a mesh whose other half is another process's
        def addressable_devices_indices_map(self, shape):
            whole = where.devices_indices_map(shape)
            return {device: whole[device] for device in mesh.devices.flat if device.id % 2}

    assert len(sharding.local_rows(Half(), 16)) == 8 and set(sharding.local_rows(Half(), 16)) == {0, 1, 4, 5, 8, 9, 10, 11}


def test_a_process_reads_its_rows():
    """Whichever they are, they are those of the whole batch."""
    source = digits.load()
    whole, part = pipeline.Batches(source, 5, 16), pipeline.Batches(source, 5, 16, rows=np.array([1, 2, 9, 15]))
    for step in (0, 200):
        for name, values in part[step].items():
            np.testing.assert_array_equal(values, whole[step][name][[1, 2, 9, 15]])


# Two processes.


def start(*command, devices: int = 2, **environ) -> list[subprocess.Popen]:
    """The command twice, as two processes; PROCESS in it stands for the number of each."""
    env = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": f"{ROOT}:{HERE}", **environ}
    port = free_port()
    return [subprocess.Popen([sys.executable, *(str(word).replace("PROCESS", str(i)) for word in command),
                              f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"],
                             env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]


def finish(processes, *codes: int, timeout: float = 900) -> list[tuple[str, str]]:
    """Their outputs, once they have ended with these codes."""
    try:
        out = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == list(codes or (0, 0)), "\n".join(e[-3000:] for _, e in out)
    return out


def wait_until(reached, processes) -> None:
    """Until `reached()`; fails with the outputs where a process ends before."""
    deadline = time.monotonic() + 900
    while not reached():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            time.sleep(1)
            finish(processes, None, None, timeout=150)
        time.sleep(0.05)


def job(name, folder) -> list[dict]:
    finish(start(HERE / "two_processes.py", name, folder))
    return [json.loads((folder / f"{name}.{i}.json").read_text()) for i in range(2)]


def test_two_processes_are_one(tmp_path):
    """Errors end all of them, with one voice; images and features are those of one process."""
    found = job("agree", tmp_path)
    told = [(f["count"], f["devices"], f["first"], f["result"], f["agreed"]) for f in found]
    assert told == [(2, 4, True, 10, 20), (2, 4, False, 11, 20)]
    for f, elsewhere in zip(found, (False, True)):
        assert f["bad input in 1"] == f"Failed: process 1: x: got 1; told elsewhere: {elsewhere}"
        assert f["bad input in 0"] == f"Failed: y: got 2; told elsewhere: {elsewhere}"
        assert f["different"].startswith("arguments: process 1 was given something else than process 0")
        assert f["not shared"].startswith("process 1: workdir: got ") and "allowed: one on a file system that all" in f["not shared"]
    assert found[0]["a bug in 1"].startswith("RuntimeError: process 1: KeyError: 'z'")
    assert found[1]["a bug in 1"].startswith("KeyError: 'z'")
    assert (tmp_path / "by_first").read_text() == "0" and not list(tmp_path.rglob(".shared*"))
    assert [f["rows"] for f in found] == [[0, 1, 2, 3], [4, 5, 6, 7]] and all(f["from_rows"] for f in found)

    layout = sharding.Layout(sharding.make_mesh("data:2,fsdp:2", devices=jax.devices()[:4]))
    net = tiny.PixelNet()
    sampler = ImageSampler(net, SamplerSpec(num_steps=2, S_churn=1.0), Latents(net.image_shape, 3), layout=layout, batch_per_device=4)
    params = sharding.place(tiny.random_params(net.shapes()), jax.tree.map(lambda _: layout.replicated, net.shapes()))
    images, classes = sampler(params, seed=3, count=21)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 1), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "InceptionV3", two_processes._Stand_in)
        colours, = inception.batched({"w": np.eye(3, dtype=np.float32)}, inception.CONVENTIONS["edm"], layout=layout, dtype="float32",
                                     outputs=("features",), batch_per_device=2)(pixels[:11])
    for f in found:
        np.testing.assert_array_equal(f["images"], images)
        np.testing.assert_array_equal(f["classes"], classes)
        np.testing.assert_allclose(f["features"], features.digits_features(layout=layout)(pixels)[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(f["inception"], colours, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_one_and_two_again(tmp_path):
    """Every layout: saved by two processes, restored and saved by one (and on one device), restored by two: equal bits, and next steps."""
    by_two = job("save", tmp_path)
    ends = {}
    for layout in two_processes.LAYOUTS:
        for devices in (None, 1):
            net = tiny.PixelNet()
            _, shardings, _, teacher, step = two_processes.on(layout, net, devices)
            with checkpoint.Checkpoints(tmp_path / layout) as checkpoints:
                found, state, meta = checkpoints.restore_newest(two_processes.shapes(net), shardings)
            assert (found, meta["seconds"]) == (5, 1.0) and two_processes.same(state, net)
            if devices is None:
                with checkpoint.Checkpoints(tmp_path / f"{layout}_one") as checkpoints:
                    checkpoints.save(5, state, {"seconds": 2.0})
            ends[layout, devices] = two_processes.losses(step, state, teacher)
    back = job("restore", tmp_path)
    reference = ends["replicated", 1]
    for layout in two_processes.LAYOUTS:
        assert all(b[layout]["same"] and b[layout]["step"] == 5 and b[layout]["meta"]["seconds"] == 2.0 for b in back)
        for end in (by_two[0][layout], by_two[1][layout], ends[layout, None], ends[layout, 1], back[0][layout]["losses"]):
            assert end.keys() == reference.keys()
            for name, value in reference.items():
                assert end[name] == pytest.approx(value, rel=1e-5), (layout, name)


@pytest.mark.slow
def test_bad_input_is_refused_by_both_and_told_once(tmp_path):
    config = f"--config={ROOT / 'launch' / 'rehearsal.py'}"
    run = ("-m", "sim_jax.main", config, f"--workdir={tmp_path / 'run'}")
    for wrong, words in ((["--config.batch_size=7"], "batch_size"), (["--config.nothing=1"], "nothing"),
                         (["--config.teacher.path=nowhere"], "nowhere")):
        out = finish(start(*run, *wrong), 2, 2)
        errors = [line for _, text in out for line in text.splitlines() if line.startswith(("error", "process"))]
        assert len(errors) == 1 and words in errors[0] and errors[0].startswith("error: "), out
        assert "Traceback" not in out[0][1] + out[1][1]
    out = finish(start("-m", "sim_jax.sample", f"--weights={tmp_path}", f"--out={tmp_path / 'x.npz'}"), 2, 2)
    assert sum(text.count("error: ") for _, text in out) == 1
    out = finish(start(*run, "--config.seed=PROCESS"), 2, 2)
    assert "arguments: process 1 was given something else than process 0" in out[0][1] and "error" not in out[1][1]


@pytest.mark.slow
def test_samples_and_figures_of_two_processes(tmp_path):
    """sim_jax.sample and sim_jax.evaluate by two processes of two devices, and by one of four: the same file and figures."""
    same = ("--weights=builtin:digits", "--num=30", "--steps=3", "--batch=4")
    finish(start("-m", "sim_jax.sample", *same, f"--out={tmp_path / 'two.npz'}"))
    out = finish(start("-m", "sim_jax.evaluate", *same, "--metrics=fd,class,pr", f"--out={tmp_path / 'two.json'}"))
    assert "fd" in out[0][0] and "fd" not in out[1][0] and not out[1][0].replace("\n", "").replace(" ", "").startswith("builtin")
    env = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    for module, *more in (("sim_jax.sample", f"--out={tmp_path / 'one.npz'}"),
                          ("sim_jax.evaluate", "--metrics=fd,class,pr", f"--out={tmp_path / 'one.json'}")):
        assert subprocess.run([sys.executable, "-m", module, *same, *more], env=env, cwd=ROOT).returncode == 0
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        np.testing.assert_array_equal(one["images"], two["images"])
        np.testing.assert_array_equal(one["labels"], two["labels"])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["protocol"] == two["protocol"]
    for name in ("fd", "class_agreement", "precision", "recall"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.slow
def test_a_killed_process_takes_the_other_along(tmp_path):
    """It does not wait for ever, says why, and the checkpoint is whole."""
    run = tmp_path / "run"
    processes = start("-m", "sim_jax.main", f"--config={ROOT / 'launch' / 'rehearsal.py'}", f"--workdir={run}", "--config.total_kimg=1000",
                      "--config.run.save_every=5")
    wait_until((run / "checkpoints" / "5").is_dir, processes)
    processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    out, error = processes[0].communicate(timeout=300)
    assert time.monotonic() - begin < 150
    assert processes[0].returncode not in (0, 2, 143) and ("another process is gone" in error or "another task died" in error), error
    assert checkpoint.latest_step(run / "checkpoints") >= 5
