"""Several processes, as torchrun starts them: how they meet, stay silent, and end together if one of them fails.

The first that fails says so and leaves its exit status with the others, which end with the same.  One that was killed says nothing: each
process shows every second that it lives, and where one has not done so for a while, the others name it and end.  Where the main thread
waits for an exchange it sees no signal, so that a thread beside it ends the process.
"""

import _thread
import atexit
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

BEAT = 1  # seconds between two signs of life; what follows is counted in such beats, so that time in which all stand still does not count
SILENT = 30  # seconds without one, after which a process is lost
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
            store, *_ = next(dist.rendezvous("env://", self.rank, self.size, timeout=MEETING))
        except (RuntimeError, ValueError) as e:
            raise UsageError(f"process {self.rank}: finds no others ({str(e).splitlines()[0]}); start all of them with torchrun") from e
        # With --max-restarts torchrun's store still has what the last processes left there.
        self.store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.look = self.store.clone()  # a connection of its own, as the other one may be waiting
        self.seen, self.lost = {}, None  # {rank: (sign, beats since it came)}, and which has ended
        self.looks, self.cut_off = 0, False  # how often it has looked, and whether nothing answers any more where all meet
        self.stopped, self.suspicious = threading.Event(), False
        self.signals, pipe = os.pipe()
        for end in (self.signals, pipe):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)  # gets every signal at once, wherever the main thread is
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
        names = [f"device {rank}" for rank in range(self.size)]
        try:
            self.store.set(names[self.rank], device.type)
            self.store.wait(names, MEETING)
            first, *others = kinds = [self.store.get(name).decode() for name in names]
        except RuntimeError as e:
            raise UsageError(f"not all of the {self.size} processes have come within {MEETING}") from e
        if set(others) - {first}:  # they would wait for each other for ever
            rank = next(rank for rank, kind in enumerate(kinds) if kind != first)
            raise UsageError(
                f"process {rank}{self.describe(rank)} computes on {kinds[rank]}, process 0 on {first}: PyTorch finds GPUs on some machines"
                " only; say --device cpu, or start it where all have GPUs"
            )
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
        if self.cut_off:
            return
        with suppress(RuntimeError):
            self.look.set(f"gone {self.rank}", "")
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                left = [f"gone {rank}" for rank in range(self.size) if self.lost != (rank, None)]
                self.look.wait(left, timedelta(seconds=SUSPECTED))

    def is_first(self, text):
        """Whether no other process has said this before: what all have to say, one says."""
        try:
            return self.cut_off or self.look.add(f"said {text}", 1) == 1
        except RuntimeError:  # the process has ended at which all meet
            return True

    def speaks(self, status):
        """Whether this process is the first that fails.  The others end with its exit status."""
        return self.first_failure(status)[0] == self.rank

    def first_failure(self, status):
        """(rank, exit status) of the first process that fails; this one fails now."""
        if self.cut_off:
            return 0, status
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
            return "" if self.cut_off else f" ({self.look.get(f'who {rank}').decode()})"
        except RuntimeError:
            return ""

    # ---- The threads ----

    def run(self):
        """End this process when another one has ended, or when it is told to."""
        threading.Thread(target=self.watch, daemon=True).start()
        looks = unanswered = told = 0
        while self.lost is None and told * BEAT < SUSPECTED + 2 * BEAT:
            if self.stopped.wait(BEAT):
                return
            unanswered = unanswered + 1 if self.looks == looks else 0
            looks = self.looks
            if unanswered * BEAT > SILENT:
                self.cut_off, self.lost = True, (0, None)
            self.suspicious |= self.is_told()
            told += self.suspicious
        if not self.suspicious and not self.stopped.is_set():  # else it is on its way out
            _thread.interrupt_main(signal.SIGTERM)
        if not self.stopped.wait(GRACE):  # in an exchange that never ends, say
            status = self.report() if self.lost else 128 + signal.SIGTERM
            sys.stderr.flush()
            cleaning = threading.Thread(target=atexit._run_exitfuncs, daemon=True)  # which removes temporary folders
            cleaning.start()
            cleaning.join(SUSPECTED)
            os._exit(status)

    def is_told(self):
        """Whether a signal has come that ends this process."""
        try:
            return not {signal.SIGTERM, signal.SIGINT}.isdisjoint(os.read(self.signals, 100))
        except BlockingIOError:
            return False

    def watch(self):
        """Show that this process lives, and look for the others."""
        while self.lost is None and not self.stopped.wait(BEAT):
            try:
                self.live()
                lost = self.find_lost()
            except RuntimeError:  # the machine that all meet on is gone
                lost = (0, None)
            self.lost = self.lost or lost
            self.looks += 1

    def live(self):
        self.look.set(f"lives {self.rank}", repr(time.time()))

    def find_lost(self):
        """(rank, exit status) of a process that has ended, with None for a status that it did not leave; else None."""
        if self.look.check(["end"]):
            rank, status = map(int, self.look.get("end").split())
            return (rank, status) if rank != self.rank else None
        limit = SUSPECTED if self.suspicious else SILENT
        for rank in range(self.size):
            key = f"lives {rank}"
            if rank != self.rank and self.look.check([key]):
                sign = self.look.get(key)
                before, beats = self.seen.get(rank, (None, 0))
                beats = beats + 1 if sign == before else 0
                self.seen[rank] = sign, beats
                if beats * BEAT > limit:
                    return rank, None
        return None
