"""The launch scripts do what they say, with stand-ins for srun, scontrol and gcloud; the manifest is one that JobSet takes."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import stat
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
yaml = pytest.importorskip("yaml")


def program(folder: pathlib.Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def bash(script, *args, bin=None, cwd=None, **environ) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}" if bin else os.environ["PATH"], **environ}
    return subprocess.run(["bash", str(script), *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and re.search("^set -e?uo pipefail$", text, re.M)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "--severity=warning", path], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_local_takes_what_it_is_given(tmp_path):
    program(tmp_path, "python", 'printf "%s\\n" "$@"')
    done = bash(LAUNCH / "local.sh", "configs/a.py:b", "runs/x y", "--config.seed=1", bin=tmp_path)
    assert done.stdout.splitlines() == ["-m", "sim_jax.main", "--config=configs/a.py:b", "--workdir=runs/x y", "--config.seed=1"]
    assert bash(LAUNCH / "local.sh").returncode != 0


@pytest.mark.parametrize("code, state, restarts, requeued", [
    (0, "RUNNING", 0, False), (143, "RUNNING", 3, True), (1, "RUNNING", 0, True), (134, "RUNNING", 0, True), (2, "RUNNING", 0, False),
    (130, "RUNNING", 0, False), (143, "CANCELLED", 0, False), (143, "", 0, False), (143, "RUNNING", 100, False)])
def test_slurm_queues_again_what_was_stopped(tmp_path, code, state, restarts, requeued):
    """And nothing that is done, refused or cancelled."""
    program(tmp_path / "bin", "srun", f'printf "%s|" "$@" >> {tmp_path}/srun; exit {code}')
    program(tmp_path / "bin", "squeue", f"echo {state}")
    program(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol')
    done = bash(LAUNCH / "slurm.sbatch", "configs/a.py:b", "runs/x", "--config.gan.weight=0.5", bin=tmp_path / "bin", cwd=tmp_path,
                SLURM_JOB_ID="42", SLURM_RESTART_COUNT=str(restarts), VENV="nowhere", SLURM_SUBMIT_DIR=str(tmp_path))
    words = (tmp_path / "srun").read_text().split("|")
    assert words[-7:-1] == ["-m", "sim_jax.main", "--distributed=on", "--config=configs/a.py:b", "--workdir=runs/x",
                            "--config.gan.weight=0.5"]
    assert (tmp_path / "scontrol").exists() == requeued and done.returncode == (0 if requeued else code), done.stderr
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 42\n"


def test_slurm_asks_for_a_warning_and_for_the_queue():
    wanted = [line.split("#")[1].split(maxsplit=1)[1].split()[0] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
              if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append", "--ntasks-per-node=1"} <= set(wanted)


@pytest.fixture
def pod(tmp_path):
    """(run, folder of the one worker, log of gcloud): `gcloud ... ssh` runs the command in that folder."""
    worker, log = tmp_path / "worker", tmp_path / "gcloud.log"
    (worker / "sim_jax").mkdir(parents=True)
    program(worker / "venv" / "bin", "python", f'echo $$ > {tmp_path}/started; printf "%s\\n" "$@" > {tmp_path}/arguments\n'
                                               'trap "exit 143" TERM; for i in $(seq 2000); do sleep 0.05; done')
    for tool in ("gcsfuse", "mountpoint"):
        program(tmp_path / "bin", tool, f'echo {tool} "$@" >> {log}')
    program(tmp_path / "bin", "gcloud", f'echo "$@" | head -n 1 >> {log}\n'
            f'for word in "$@"; do case "$word" in --command=*) cd {worker} && bash -c "${{word#--command=}}"; exit $?;; esac; done\n'
            'case "$*" in *describe*) echo READY;; esac')

    def run(*args, **environ):
        return bash(LAUNCH / "tpu_pod.sh", *args, bin=tmp_path / "bin", PROJECT="p", BUCKET="b", ZONE="z", GRACE="60", **environ)

    return run, worker, log


def _wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_a_pod_runs_is_told_to_stop_and_says_how_it_ended(pod, tmp_path):
    run, worker, log = pod
    assert run("start", "configs/a.py:b", "some run", "--config.sharding.rules=(('.*','fsdp'),)").returncode == 0
    _wait_for(tmp_path / "arguments")
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "-m", "sim_jax.main", "--distributed=on", "--workdir=../shared/some run", "--config=configs/a.py:b",
        "--config.sharding.rules=(('.*','fsdp'),)"]
    assert run("status").stdout.strip() == "running"
    again = run("start", "configs/a.py:b", "some run")
    assert again.returncode != 0 and "it is running already" in again.stderr
    assert run("stop").returncode == 0
    _wait_for(worker / "sim_jax.code")
    assert run("status").stdout.strip() == "exit code 143"
    calls = log.read_text()
    assert "compute tpus tpu-vm ssh sim-jax --worker=all" in calls and "--project=p --zone=z" in calls


def test_a_pod_is_made_and_removed(pod):
    run, _, log = pod
    assert run("create", TYPE="v6e-16", VERSION="v").returncode == 0 and run("create", SPOT="0").returncode == 0
    assert run("delete").returncode == 0
    first, second, third = log.read_text().splitlines()
    assert first.startswith("compute tpus tpu-vm create sim-jax --accelerator-type=v6e-16 --version=v") and "--spot" in first
    assert "--spot" not in second and third.startswith("compute tpus tpu-vm delete sim-jax --quiet")
    dry = run("setup", DRY_RUN="1")
    assert dry.returncode == 0 and "pip" in dry.stdout and len(log.read_text().splitlines()) == 3


def test_a_pod_wants_to_know_where(tmp_path):
    done = bash(LAUNCH / "tpu_pod.sh", "create")
    assert done.returncode == 2 and done.stderr.startswith("error: PROJECT, BUCKET: got your-project")
    done = bash(LAUNCH / "tpu_pod.sh", "dance", PROJECT="p", BUCKET="b")
    assert done.returncode == 2 and "allowed: create" in done.stderr


# The part of JobSet's v1alpha2 schema (api/jobset/v1alpha2/jobset_types.go) and of batch/v1, core/v1 that the manifest uses:
# a type, a dictionary of what may be there, [one of these] for lists, {values} for enumerations.
_JOB = {"parallelism": int, "completions": int, "completionMode": {"Indexed"}, "backoffLimit": int, "podFailurePolicy": {
    "rules": [{"action": {"FailJob", "FailIndex", "Ignore", "Count"},
               "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}}]}}
_CONTAINER = {"name": str, "image": str, "command": [str], "args": [str], "env": [{"name": str, "value": str}],
              "ports": [{"containerPort": int}], "resources": {"requests": {"google.com/tpu": int}, "limits": {"google.com/tpu": int}},
              "volumeMounts": [{"name": str, "mountPath": str}]}
_POD = {"restartPolicy": {"Never"}, "terminationGracePeriodSeconds": int, "serviceAccountName": str, "nodeSelector": dict,
        "tolerations": [{"key": str, "operator": {"Exists"}, "effect": {"NoSchedule"}}], "containers": [_CONTAINER],
        "volumes": [{"name": str, "csi": {"driver": str, "volumeAttributes": {"bucketName": str, "mountOptions": str}}}]}
_SCHEMA = {
    "Service": {"apiVersion": {"v1"}, "kind": str, "metadata": {"name": str},
                "spec": {"clusterIP": {"None"}, "publishNotReadyAddresses": bool, "selector": dict}},
    "JobSet": {"apiVersion": {"jobset.x-k8s.io/v1alpha2"}, "kind": str, "metadata": {"name": str, "annotations": dict}, "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"}, "rules": [
            {"name": str, "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
             "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                                      "PodFailurePolicy"}]}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": {
            **_JOB, "template": {"metadata": {"annotations": dict}, "spec": _POD}}}}]}},
}


def _check(value, schema, where: str) -> None:
    if isinstance(schema, type):
        assert type(value) is schema, f"{where}: {value!r}"
    elif isinstance(schema, set):
        assert value in schema, f"{where}: {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for i, item in enumerate(value):
            _check(item, schema[0], f"{where}[{i}]")
    else:
        assert isinstance(value, dict) and value.keys() <= schema.keys(), f"{where}: {value.keys() - schema.keys()}"
        for key, item in value.items():
            _check(item, schema[key], f"{where}.{key}")


def test_the_manifest_is_one_that_jobset_takes():
    service, jobs = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    for document in (service, jobs):
        _check(document, _SCHEMA[document["kind"]], document["kind"])
    name, spec = jobs["metadata"]["name"], jobs["spec"]
    assert service["metadata"]["name"] == spec["network"]["subdomain"]
    assert service["spec"]["selector"] == {"jobset.sigs.k8s.io/jobset-name": name}
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container, = pod["containers"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] and job["completions"] == job["parallelism"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    # The shell has to hand SIGTERM on.
    assert container["command"] == ["bash", "-c"] and "\nexec python -m sim_jax.main" in container["args"][0]
    assert subprocess.run(["bash", "-n"], input=container["args"][0], text=True).returncode == 0
