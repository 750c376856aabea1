"""Runs a command in a virtual machine that has two RDMA devices; ends with the command's own status.

    python -m tests.rdma.vm [--env NAME=VALUE] [--timeout S] [--verbose] [--optional] -- COMMAND [ARGUMENT ...]

Inside are ``rxe0`` (10.77.0.1) and ``rxe1`` (10.77.0.2), soft-RoCE on the two ends of one cable. The checkout is where
it is on the host, to be read only, and with it its virtual environment: ``.venv/bin/python`` runs, on the machine's own
interpreter. Nothing outside can be reached. All is emulated, so neither KVM nor root is needed; it is slow.

The image is made once, in the folder ``COMPUTEMESH_VM_CACHE`` (``~/.cache/computemesh/rdma-vm``), from packages of
Debian. Status 124: the command did not end in time; 125: there is no machine, and standard error says why; with
``--optional`` that is 0. A machine that ends before its command does is a failure, 1.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.rdma.vm.image import Unavailable, build, digest

ROOT = Path(__file__).resolve().parents[3]

EMULATOR = "qemu-system-x86_64"
TOOLS = {EMULATOR: "qemu-system-x86", "apt-get": "apt", "dpkg-deb": "dpkg", "depmod": "kmod", "tar": "tar"}
"""Programs and the packages that have them."""

TIMED_OUT, NO_MACHINE = 124, 125

MACHINE = [
    *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=512"),
    # Emulated, `rep movsb` goes byte by byte, and the carry-less product is slower than a table of checksums.
    *("-cpu", "max,la57=off,erms=off,fsrm=off,pclmulqdq=off"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot", "-nic", "none"),
]
KERNEL_OPTIONS = (
    "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off no_timer_check tsc=reliable random.trust_cpu=on "
    "cryptomgr.notests lsm=none audit=0 rcupdate.rcu_expedited=1 nowatchdog rdinit=/init"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--timeout", type=float, default=600, metavar="S")
    parser.add_argument("--verbose", action="store_true", help="say how long each step took")
    parser.add_argument("--optional", action="store_true", help="where no machine can be had, say so and end with 0")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    began = time.monotonic()

    def say(text: str) -> None:
        if args.verbose:
            print(f"rdma-vm: {time.monotonic() - began:5.1f} s  {text}", file=sys.stderr, flush=True)

    try:
        image = ready_image(say)
        return run(image, args.command, args.env, args.timeout, say)
    except Unavailable as why:
        print(f"rdma-vm: {'skipped, since ' if args.optional else ''}there is no machine: {why}", file=sys.stderr)
        return 0 if args.optional else NO_MACHINE


def stop(number: int, frame: object) -> None:
    """Ends this program, and with it the machine."""
    sys.exit(128 + number)


def ready_image(say: Callable[[str], None]) -> Path:
    """The folder of the image, which is made when there is none of this recipe yet."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise Unavailable("the machine is emulated on Linux on x86-64 only")
    cache = Path(os.environ.get("COMPUTEMESH_VM_CACHE") or "~/.cache/computemesh/rdma-vm").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    image = cache / digest()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that begin at once make one image
        need_tools(say)
        if not image.exists():
            say("making the image")
            build(image, cache / "packages")
            for old in cache.iterdir():
                if old.is_dir() and old.name not in {image.name, "packages"}:
                    shutil.rmtree(old)
            size = sum(path.stat().st_size for path in image.iterdir()) >> 20
            say(f"the image is made: {size} MiB")
    python = (image / "python").read_text()
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        raise Unavailable(
            f"the machine has Python {python}, and the packages of this environment are for "
            f"{platform.python_version()}: make the environment with python{python}"
        )
    return image


def need_tools(say: Callable[[str], None]) -> None:
    """Installs what is missing where that is possible."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool, path=path) is None]
    if not missing:
        return
    command = ["apt-get", "install", "-qy", "--no-install-recommends", *missing]
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise Unavailable(f"{', '.join(missing)} must be installed first: sudo {' '.join(command)}")
    say(f"installing {', '.join(missing)}")
    for step in (["apt-get", "-q", "update"], command):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{' '.join(step)} failed: {done.stderr.strip()[-2000:]}")


def run(image: Path, command: list[str], variables: list[str], timeout_s: float, say: Callable[[str], None]) -> int:
    """Starts the machine, shows what `command` prints, and returns its status."""
    lines = [f"CHECKOUT={shlex.quote(str(ROOT))}", f"PYTHON={shlex.quote(sys.base_prefix)}", "run() {"]
    for variable in variables:
        name, _, value = variable.partition("=")
        lines.append(f"export {name}={shlex.quote(value)}")
    lines += [shlex.join(command), "}"]
    # The machine cannot write byte code into the checkout, and to compile is what it would do most of its time.
    compiled = [str(ROOT / name) for name in ("shared", "services", "tests")]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *compiled], check=False, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="rdma-vm-") as work:
        folder = Path(work)
        (folder / "job").write_text("\n".join(lines) + "\n")
        arguments = [
            *(EMULATOR, *MACHINE, "-smp", str(min(4, os.cpu_count() or 1)), "-m", "2048"),
            *("-kernel", str(image / "vmlinux"), "-initrd", str(image / "initrd"), "-append", KERNEL_OPTIONS),
            *("-serial", f"file:{folder}/console", "-device", "virtio-serial-pci"),
            *("-chardev", "stdio,id=output,signal=on", "-device", "virtserialport,chardev=output,nr=1"),
            *("-chardev", f"file,id=status,path={folder}/status", "-device", "virtserialport,chardev=status,nr=2"),
            *("-fw_cfg", f"name=opt/computemesh,file={folder}/job"),
            *("-fsdev", f"local,id=checkout,path={ROOT},security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=checkout,mount_tag=checkout"),
        ]
        say("starting the machine")
        with subprocess.Popen(arguments, stdin=subprocess.PIPE) as machine:
            try:
                machine.wait(timeout_s)
            except subprocess.TimeoutExpired:
                print(f"rdma-vm: stopped after {timeout_s:g} s", file=sys.stderr)
                return TIMED_OUT
            finally:
                machine.kill()
        say("the machine has ended")
        status = (folder / "status").read_text().strip()
        console = (folder / "console").read_text(errors="replace")
    match status.split():
        case []:
            raise Unavailable(f"it ended by itself, the emulator with {machine.returncode}:\n{console[-4000:]}")
        case ["begun", ended]:
            return int(ended)
        case ["begun"]:
            print(f"rdma-vm: the machine ended before its command did:\n{console[-4000:]}", file=sys.stderr)
        case _:  # its recipe does not fit its packages
            print(f"rdma-vm: the machine could not be prepared:\n{console[-4000:]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
