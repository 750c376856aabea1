"""The machine's kernel and its files, made of Debian packages without root: nothing is installed, only unpacked.

Everything is one archive that the kernel unpacks into memory, so there is no disk, and each run begins afresh.
Modules are loaded by ``init.sh``, which is the first process.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

INIT = Path(__file__).with_name("init.sh")

PACKAGES = ("busybox-static", "ibverbs-providers", "iproute2", "libibverbs1", "python3", "python3-pyverbs")

MODULES = ("virtio_pci", "virtio_console", "9p", "9pnet_virtio", "qemu_fw_cfg", "veth", "crc32_generic", "rdma_rxe")
"""``9p`` shows the host's folders; ``rdma_rxe`` is soft-RoCE, which wants ``crc32_generic`` without saying so."""

LEFT_OUT = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/perl*", "./usr/lib/*/perl*")

XZ_MAGIC = b"\xfd7zXZ\x00"
SIGNED = b"~Module signature appended~\n"


class Unavailable(Exception):
    """The machine cannot be had here; the text says why, and what would help."""


def digest() -> str:
    """What the recipe says, as a name: an image with another one is of no use."""
    return hashlib.sha256(Path(__file__).read_bytes() + INIT.read_bytes()).hexdigest()[:16]


def build(image: Path, packages: Path) -> None:
    """Makes the folder `image` with ``vmlinux`` and ``initrd``; `packages` keeps what was downloaded, for later."""
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="build-") as work:
        root, kernel, made = (Path(work) / name for name in ("root", "kernel", "image"))
        kernel_package = _download(packages)
        _unpack((packages / "archives").glob("*.deb"), root)
        _unpack((packages / "kernel").glob(f"{kernel_package}_*.deb"), kernel)
        made.mkdir()
        version = kernel_package.removeprefix("linux-image-")
        (made / "vmlinux").write_bytes(_bare_kernel((kernel / "boot" / f"vmlinuz-{version}").read_bytes()))
        _modules(kernel, version, root)
        _furnish(root)
        with (made / "initrd").open("wb") as archive:
            archive.writelines(_newc(root))
        (made / "python").write_text(_python_version(root))
        shutil.rmtree(image, ignore_errors=True)
        made.rename(image)


def _download(folder: Path) -> str:
    """Fetches the packages and what they need into `folder` by the host's sources, and returns the kernel's name."""
    for name in ("lists/partial", "archives/partial", "kernel"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()  # as on a machine on which nothing is installed
    options = [
        f"Dir::State::Lists={folder}/lists",
        f"Dir::State::Status={folder}/status",
        f"Dir::Cache={folder}",
        f"Dir::Cache::Archives={folder}/archives",
        "Dir::Log=/dev/null",
        "APT::Install-Recommends=false",
        "APT::Sandbox::User=",
        "Debug::NoLocking=true",
    ]
    flags = [part for option in options for part in ("-o", option)]
    _run("apt-get", *flags, "-q", "update")
    for old in (folder / "archives").glob("*.deb"):
        old.rename(folder / "archives" / "partial" / old.name)
    wanted = _run("apt-get", *flags, "-qq", "--print-uris", "install", *PACKAGES).split("\n")
    for name in [line.split()[1] for line in wanted if line]:  # 'URI' name size digest
        kept = folder / "archives" / "partial" / name
        if kept.exists():
            kept.rename(folder / "archives" / name)
    _run("apt-get", *flags, "-qqy", "--download-only", "install", *PACKAGES)
    depends = _run("apt-cache", *flags, "depends", "linux-image-amd64").split()
    kernels = [word for word in depends if word.startswith("linux-image-") and word.endswith("-amd64")]
    if not kernels or kernels[-1] == "linux-image-amd64":
        raise Unavailable("the package sources of this host have no linux-image-amd64")
    if not list((folder / "kernel").glob(f"{kernels[-1]}_*.deb")):
        _run("apt-get", *flags, "-qq", "download", kernels[-1], cwd=folder / "kernel")
    return kernels[-1]


def _unpack(packages: Iterable[Path], root: Path) -> None:
    for name in ("bin", "lib", "lib64", "sbin"):  # packages write below them and below /usr, which are one
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    left_out = [f"--exclude={name}" for name in LEFT_OUT]
    for package in sorted(packages):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as files:
            command = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", *left_out, "-C", str(root)]
            subprocess.run(command, stdin=files.stdout, check=True)
        if files.returncode:
            raise Unavailable(f"{package} is no Debian package; remove it, and it is fetched again")


def _bare_kernel(compressed: bytes) -> bytes:
    """The ELF file within, which the emulator starts at once; emulated, it would take seconds to unpack itself."""
    start = compressed.find(XZ_MAGIC)
    if start < 0:
        return compressed
    kernel = lzma.LZMADecompressor().decompress(compressed[start:])
    return kernel if kernel.startswith(b"\x7fELF") else compressed


def _modules(kernel: Path, version: str, root: Path) -> None:
    """Puts the modules that are loaded into ``/modules``, and their names into ``/modules/order``."""
    _run("depmod", "-b", str(kernel), version)
    order: dict[str, Path] = {}
    for module in MODULES:
        listed = _run("modprobe", "-d", str(kernel), "-S", version, "--show-depends", module)
        for line in listed.splitlines():
            if line.startswith("insmod "):
                path = Path(line.split()[1])
                order.setdefault(path.name, path)
    folder = root / "modules"
    folder.mkdir()
    for name, path in order.items():
        (folder / name).write_bytes(_unsigned(path.read_bytes()))
    (folder / "order").write_text("".join(f"{name}\n" for name in order))


def _unsigned(module: bytes) -> bytes:
    """Checking a signature costs seconds when emulated, and nothing demands one."""
    if not module.endswith(SIGNED):
        return module
    described = len(module) - len(SIGNED) - 12  # struct module_signature; its last four bytes are the length
    return module[: described - int.from_bytes(module[described + 8 : described + 12], "big")]


def _furnish(root: Path) -> None:
    busybox = next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists())
    for applet in _run(str(busybox), "--list").split():
        if not any((root / folder / applet).exists() for folder in ("bin", "sbin")):
            (root / "bin" / applet).symlink_to("busybox")
    for name in ("dev", "proc", "sys", "run", "tmp", "root"):
        (root / name).mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost rdma-vm\n10.77.0.1 rxe0\n10.77.0.2 rxe1\n")
    shutil.copy(INIT, root / "init")
    (root / "init").chmod(0o755)
    # Byte code is made once, here, and not at each start; by an interpreter of this version where there is one.
    version = _python_version(root)
    python = shutil.which(f"python{version}")
    if python:
        command = [
            python,
            "-m",
            "compileall",
            "-q",
            "-s",
            str(root),
            "-p",
            "/",
            str(root / "usr/lib" / f"python{version}"),
        ]
        subprocess.run([*command, str(root / "usr/lib/python3")], check=False, stdout=subprocess.DEVNULL)


def _python_version(root: Path) -> str:
    """Such as ``3.11``."""
    return (root / "usr/bin/python3").readlink().name.removeprefix("python")


def _newc(root: Path) -> Iterator[bytes]:
    """`root` as an archive that the kernel unpacks, all of it root's."""
    number = 0
    for folder, folders, files in os.walk(root):
        for path in [Path(folder, name) for name in sorted(folders) + sorted(files)]:
            number += 1
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                content = os.fsencode(path.readlink())
            else:
                content = path.read_bytes() if stat.S_ISREG(mode) else b""
            yield _entry(number, mode, os.fsencode(path.relative_to(root)), content)
    yield _entry(number + 1, stat.S_IFCHR | 0o600, b"dev/console", b"", device=(5, 1))  # what `init` writes to
    yield _entry(0, 0, b"TRAILER!!!", b"")


def _entry(number: int, mode: int, name: bytes, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name + b"\0"
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{command[0]} failed with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout
