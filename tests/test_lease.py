"""The lease: real processes on one folder. One of them holds it, dies, freezes or releases it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vlm4rec_spark.errors import Busy, RunError
from vlm4rec_spark.storage.files import LocalFiles
from vlm4rec_spark.storage.lease import Lease

SECONDS = 2.0
IMPORT_HOLD = (
    f"import sys; from pathlib import Path; sys.path[:0] = [{str(Path(__file__).parent)!r}]; "
    "from test_lease import hold"
)


def lease(
    folder: Path, run_id: str, seconds: float = SECONDS, cancelled: list | None = None
) -> Lease:
    calls: list = [] if cancelled is None else cancelled
    context = SimpleNamespace(cancelAllJobs=lambda: calls.append(run_id))
    tables = SimpleNamespace(
        folder=lambda: str(folder),
        location=str(folder),
        filesystem=lambda uri: LocalFiles(),
        spark=SimpleNamespace(sparkContext=context),
    )
    return Lease(cast(Any, tables), run_id, seconds, print)


def hold(folder: Path, run_id: str, seconds: float, work: float) -> None:
    """What each process does: hold the lease for `work` seconds, and fail if it isn't alone."""
    try:
        with lease(folder, run_id, seconds) as acquired:
            alone = folder / "alone"
            alone.touch(exist_ok=False)
            print("held", flush=True)
            time.sleep(work)
            acquired.check()
            alone.unlink()
        print("done", flush=True)
    except Busy as busy:
        print(f"busy: {busy}", flush=True)


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path) -> Iterator[Start]:
    """A function that starts `hold` in a process of its own."""
    started: list[subprocess.Popen] = []

    def begin(run_id: str, seconds: float = SECONDS, work: float = 0.0) -> subprocess.Popen:
        code = f"{IMPORT_HOLD}; hold(Path({str(tmp_path)!r}), {run_id!r}, {seconds}, {work})"
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert "Error" not in err, err
    return str(out)


def leases(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*lease*"))


def test_it_is_held_inside_and_leaves_no_file(tmp_path):
    with lease(tmp_path / "tables", "one") as acquired:
        acquired.check()
        assert leases(tmp_path / "tables") == ["_lease-000001.json"]
    assert leases(tmp_path / "tables") == []


def test_of_many_runs_that_start_together_one_works_at_a_time_and_the_rest_say_busy(
    tmp_path, start: Start
):
    ends = [output(process) for process in [start(f"run-{n}", work=1.5) for n in range(6)]]
    done = [end for end in ends if end.endswith("done\n")]
    busy = [
        end
        for end in ends
        if "busy: Another run is at work on these tables: run run-" in end
        or "busy: Another run is at work on these tables: a run that is just starting" in end
    ]
    # A run that comes when the first one is done may work too. Two are never inside together.
    assert len(done) + len(busy) == len(ends)
    assert done
    assert busy
    assert sorted(file.name for file in tmp_path.iterdir()) == []


def test_a_run_whose_file_is_still_empty_is_named_when_it_has_written_it(tmp_path, capsys):
    file = tmp_path / "_lease-000001.json"
    file.touch()
    writes = threading.Timer(0.5, file.write_text, ['{"run_id": "quick", "host": "h"}'])
    writes.start()
    with pytest.raises(Busy, match="run quick on h"), lease(tmp_path, "second"):
        pass
    writes.join()
    assert "(a run that is just starting)" in capsys.readouterr().out


def test_the_next_run_need_not_wait_for_one_that_was_killed_on_this_machine(tmp_path, start: Start):
    killed = start("killed", seconds=60, work=60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "held\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert leases(tmp_path) == ["_lease-000001.json"]
    before = time.monotonic()
    with lease(tmp_path, "next", seconds=60):
        assert leases(tmp_path) == ["_lease-000002.json"]
    assert time.monotonic() - before < 30
    assert leases(tmp_path) == []


def test_a_frozen_holder_loses_its_lease_and_notices(tmp_path, start: Start):
    frozen = start("frozen", work=6)
    assert frozen.stdout is not None
    assert frozen.stdout.readline() == "held\n"
    frozen.send_signal(signal.SIGSTOP)
    with lease(tmp_path, "next") as acquired:
        assert leases(tmp_path) == ["_lease-000002.json"]
        frozen.send_signal(signal.SIGCONT)
        out, err = frozen.communicate(timeout=60)
        assert "done" not in out
        assert (
            "RunError: Another run took over these tables, because this one gave no sign of" in err
        )
        acquired.check()


def test_a_run_that_loses_its_lease_stops_its_spark_jobs(tmp_path):
    cancelled: list[str] = []
    with lease(tmp_path, "slow", seconds=1.0, cancelled=cancelled) as acquired:
        (tmp_path / "_lease-000002.json").write_text("{}")
        deadline = time.monotonic() + 20
        while not cancelled and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RunError, match="Another run took over"):
            acquired.check()
    assert cancelled == ["slow"]
    # The other run's file stays.
    assert "_lease-000002.json" in leases(tmp_path)


@pytest.mark.parametrize("folder", ["/proc/nowhere/tables", "{tmp}/file/tables", "{tmp}/file"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, folder: str):
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(
            RunError, match=r"nothing can be written to .* with --set tables="
        ) as refused,
        lease(Path(folder.format(tmp=tmp_path)), "one"),
    ):
        pass
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_a_user_without_permission_gets_the_systems_reason():
    code = (
        f"{IMPORT_HOLD}, lease; import os\n"
        "os.getuid() or os.setuid(65534)  # root may write anywhere\n"
        "try: lease(Path('/usr/tables'), 'one').__enter__()\n"
        "except Exception as refused: print(type(refused).__name__, refused)"
    )
    command = [sys.executable, "-c", code]
    message = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert message.startswith(
        "RunError tables: nothing can be written to /usr/tables ([Errno 13] Permission denied"
    )
    assert message.count("\n") == 1
