"""Several processes, as torchrun starts them: how they meet, stay silent, and end together if one of them fails.

The first that fails says so and leaves its exit status with the others, which end with the same.  One that was killed says nothing: each
process shows every second that it lives, and where one has not done so for a while, the others name it and end.
"""

import _thread
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from processes import World
from recipe import UsageError

BEAT = 1  # seconds between two signs of life
SILENT = 30  # without one, after which a process is lost
SUSPECTED = 5  # the same, where an exchange has failed, or torchrun wants this process to end
GRACE = 15  # seconds in which this process can clean up before it is ended
MEETING = timedelta(minutes=10)  # in which all processes must have come
FOREVER = timedelta(days=30)  # an exchange may wait for the longest solve: it is not time that tells whether others live


class Ended(BaseException):
    """Raised in the midst of anything when another process has ended, or this one is to end."""


@contextmanager
def joined(program):
    """A Launch of the processes of this run, of which this one is the RANK-th of WORLD_SIZE."""
    launch = Launch(program)
    signal.signal(signal.SIGTERM, launch.interrupted)
    launch.start()
    try:
        yield launch
        launch.leave()
    except BaseException as error:  # our own bugs too: the others have to know
        launch.failed(error)
        raise
    finally:
        launch.stopped.set()
        launch.take_leave()


class Launch(threading.Thread):
    """What a process knows of the others: a thread that shows that it lives, and looks whether they do."""

    def __init__(self, program):
        super().__init__(daemon=True)
        self.program, self.rank, self.size = program, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            self.store, *_ = next(dist.rendezvous("env://", self.rank, self.size, timeout=MEETING))
        except (RuntimeError, ValueError) as e:
            raise UsageError(f"process {self.rank}: finds no others ({str(e).splitlines()[0]}); start all of them with torchrun") from e
        self.look = self.store.clone()  # a connection of its own, as the other one may be waiting
        self.seen, self.lost = {}, None  # {rank: (sign, when)}, and which has ended
        self.stopped, self.suspicious = threading.Event(), False
        self.live()
        self.look.set(f"who {self.rank}", f"{socket.gethostname()}, pid {os.getpid()}")

    # ---- The way through a run ----

    def device(self, name):
        """The name of the device of this process: of the GPUs of its machine the LOCAL_RANK-th.

        name: what --device says, or None.  Raises UsageError if there are too few.
        """
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            return name
        if name != "cuda":
            raise UsageError(f"--device {name}: torchrun gives each process a GPU of its own; say --device cuda, or leave it out")
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if gpus < processes:
            raise UsageError(f"{processes} processes, {gpus} GPUs on this machine: start no more than that, or say --device cpu")
        return f"cuda:{os.environ['LOCAL_RANK']}"

    def connect(self, device):
        """The World of these processes.  device: a torch.device, which every process must have for itself if it is a GPU."""
        try:
            self.store.wait([f"who {rank}" for rank in range(self.size)], MEETING)
        except RuntimeError as e:
            raise UsageError(f"not all of the {self.size} processes have come within {MEETING}") from e
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("exchanges", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=FOREVER,
            device_id=device if device.type == "cuda" else None,
        )
        return World(self.rank, self.size, device)

    def leave(self):
        """Wait for all others, so that none is missed while it still works."""
        if dist.is_initialized():
            dist.barrier()
            self.stopped.set()
            dist.destroy_process_group()

    def take_leave(self):
        """Let the process at which all meet, if torchrun's is not that, be the last to go."""
        with suppress(RuntimeError):
            self.look.set(f"gone {self.rank}", "")
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                left = [f"gone {rank}" for rank in range(self.size) if self.lost != (rank, None)]
                self.look.wait(left, timedelta(seconds=SUSPECTED))

    def is_first(self, text):
        """Whether no other process has said this before: what all have to say, one says."""
        try:
            return self.look.add(f"said {text}", 1) == 1
        except RuntimeError:  # the process has ended at which all meet
            return True

    def speaks(self, status):
        """Whether this process is the first that fails.  The others end with its exit status."""
        return self.first_failure(status)[0] == self.rank

    def first_failure(self, status):
        """(rank, exit status) of the first process that fails; this one fails now."""
        try:
            if self.look.add("failures", 1) == 1:
                self.look.set("end", f"{self.rank} {status}")
            return tuple(map(int, self.look.get("end").split()))
        except RuntimeError:  # the first process has ended, and where all meet with it
            return 0, status

    # ---- The way out ----

    def interrupted(self, *_):
        """Handles SIGTERM, which torchrun sends when a process has failed, and the watching thread when it finds that."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Ended

    def failed(self, error):
        """Called with the exception that ends this process.  Raises SystemExit if another one was the cause."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        status = error.code if isinstance(error, SystemExit) else 1
        if not status:
            return
        if isinstance(error, Ended | RuntimeError) and self.finds_cause():
            raise SystemExit(self.report()) from None
        if isinstance(error, Ended):
            raise SystemExit(128 + signal.SIGTERM) from None
        first, status = self.first_failure(status)
        if first != self.rank:
            raise SystemExit(status) from None

    def finds_cause(self):
        """Whether another process has ended, which may take a moment to be seen."""
        self.suspicious, end = True, time.monotonic() + SUSPECTED + 2 * BEAT
        while self.lost is None and time.monotonic() < end:
            time.sleep(BEAT / 2)
        return self.lost is not None

    def report(self):
        """Say once which process has ended, if it did not itself.  Returns the exit status."""
        rank, status = self.lost
        if status is None:
            status = 1
            if self.is_first(f"process {rank} is lost"):
                tqdm.write(
                    f"{self.program}: error: process {rank} of {self.size}{self.describe(rank)} has been killed or cannot be reached, so"
                    " the others end; the same command goes on with what is in its --checkpoint_dir, if it has one",
                    file=sys.stderr,
                )
        return status

    def describe(self, rank):
        try:
            return f" ({self.look.get(f'who {rank}').decode()})"
        except RuntimeError:
            return ""

    # ---- The thread ----

    def run(self):
        while not self.stopped.wait(BEAT):
            try:
                self.live()
                self.lost = self.find_lost()
            except RuntimeError:  # the machine that all meet on is gone
                self.lost = (0, None)
            if self.lost is not None:
                break
        else:
            return
        if not self.suspicious:
            _thread.interrupt_main(signal.SIGTERM)
        if not self.stopped.wait(GRACE):  # in an exchange that never ends, say
            status = self.report()
            sys.stderr.flush()
            os._exit(status)

    def live(self):
        self.look.set(f"lives {self.rank}", repr(time.time()))

    def find_lost(self):
        """(rank, exit status) of a process that has ended, with None for a status that it did not leave; else None."""
        if self.look.check(["end"]):
            rank, status = map(int, self.look.get("end").split())
            return (rank, status) if rank != self.rank else None
        now, limit = time.monotonic(), SUSPECTED if self.suspicious else SILENT
        for rank in range(self.size):
            key = f"lives {rank}"
            if rank != self.rank and self.look.check([key]):
                sign = self.look.get(key)
                if self.seen.get(rank, (None,))[0] != sign:
                    self.seen[rank] = sign, now
                if now - self.seen[rank][1] > limit:
                    return rank, None
        return None
